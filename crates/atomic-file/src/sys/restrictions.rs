//! What forbids replacing a file.

/// Attributes that forbid replacing a file.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Restrictions {
    pub(crate) immutable: bool,
    pub(crate) append_only: bool,
    pub(crate) mount_point: bool,
}
