//! Identifiers of images.

use std::fmt;
use std::io;
use std::str::FromStr;

/// The identifier of a state of a guest's RAM, which an image represents alone or on top of its
/// parents: 128 random bits.
///
/// A diff names its parent by this identifier. An image that is made of others and represents the
/// same state has the same identifier. For example, a merged chain has the identifier of its last
/// diff, so the next diff applies to it.
///
/// # Examples
/// ```
/// use image_format::ImageId;
///
/// let id = ImageId::random()?;
/// assert_eq!(id.to_string().parse::<ImageId>()?, id); // 32 hexadecimal digits
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ImageId([u8; 16]);

impl ImageId {
    /// Creates an identifier from the system's random numbers.
    ///
    /// # Errors
    /// Returns an error if the system has no random numbers.
    pub fn random() -> io::Result<Self> {
        let mut bytes = [0; 16];
        getrandom::fill(&mut bytes).map_err(io::Error::other)?;
        Ok(Self(bytes))
    }

    /// Creates an identifier from its bytes.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// Returns the bytes, as stored in the footer.
    #[must_use]
    pub const fn to_bytes(self) -> [u8; 16] {
        self.0
    }
}

impl fmt::Display for ImageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

impl fmt::Debug for ImageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ImageId({self})")
    }
}

/// The error of parsing an [`ImageId`] from text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid image id: give 32 hexadecimal digits")]
pub struct ParseIdError;

impl FromStr for ImageId {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        let digits = text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        let number = digits
            .then(|| u128::from_str_radix(text, 16).ok())
            .flatten();
        Ok(Self(number.ok_or(ParseIdError)?.to_be_bytes()))
    }
}
