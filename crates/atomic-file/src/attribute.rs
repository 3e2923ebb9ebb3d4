//! Attributes of files.

use std::ffi::OsString;
use std::fmt;
use std::io;

use thiserror::Error;

/// An attribute of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Attribute {
    /// The owner.
    Owner,
    /// The group.
    Group,
    /// The permission bits.
    Mode,
    /// The access control list.
    Acl,
    /// All extended attributes, if they cannot be listed.
    Xattrs,
    /// The extended attribute with this name.
    Xattr(OsString),
}

impl fmt::Display for Attribute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Owner => f.write_str("owner"),
            Self::Group => f.write_str("group"),
            Self::Mode => f.write_str("mode"),
            Self::Acl => f.write_str("access control list"),
            Self::Xattrs => f.write_str("extended attributes"),
            Self::Xattr(name) => write!(f, "extended attribute {name:?}"),
        }
    }
}

/// An attribute of the replaced file that the new file cannot receive.
#[derive(Debug, Error)]
#[error("the {attribute} of the replaced file cannot be preserved: {source}")]
pub struct NotPreserved {
    /// The attribute.
    pub attribute: Attribute,
    /// The error of the system.
    pub source: io::Error,
}
