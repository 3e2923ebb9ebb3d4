//! The states of a guest as bytes that name what they are.

use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

/// The format of a state as bytes: a magic number of 8 bytes, and the state in the format of
/// postcard. The first field of the state is the version of its format.
///
/// # Examples
/// ```
/// use guest_ram::{StateError, StateFormat};
///
/// const TIMER: StateFormat = StateFormat {
///     magic: *b"TIMER\0\0\0",
///     version: 1,
///     of: "a timer",
///     written_by: "my-vmm",
/// };
///
/// let bytes = TIMER.encode(&(1_u32, 5_u64)); // the version, and the state
/// assert_eq!(TIMER.decode::<(u32, u64)>(&bytes)?, (1, 5));
/// # Ok::<(), StateError>(())
/// ```
#[derive(Clone, Copy, Debug)]
#[allow(
    clippy::exhaustive_structs,
    reason = "a backend lists all that identifies its states"
)]
pub struct StateFormat {
    /// The first bytes.
    pub magic: [u8; 8],
    /// The version that is written, and the only one that is read.
    pub version: u32,
    /// What the state is of.
    pub of: &'static str,
    /// The crate that writes and reads the state.
    pub written_by: &'static str,
}

impl StateFormat {
    /// Returns `state` as bytes.
    ///
    /// # Panics
    /// Panics if the state refuses to be serialized, or has a list whose length is not known.
    pub fn encode(&self, state: &impl Serialize) -> Vec<u8> {
        postcard::to_extend(state, self.magic.to_vec())
            .expect("a vector grows, and no field refuses")
    }

    /// Reads the bytes of [`encode`](Self::encode). They may come from anywhere: the memory that is
    /// allocated depends on their number, not on what they claim.
    ///
    /// # Errors
    /// Returns a [`StateError`].
    pub fn decode<T: DeserializeOwned>(&self, bytes: &[u8]) -> Result<T, StateError> {
        let Self {
            version: supported,
            of,
            written_by,
            ..
        } = *self;
        let bytes = bytes
            .strip_prefix(&self.magic)
            .ok_or(StateError::NotState { of })?;
        let damaged = |_| StateError::Damaged { of };
        let (found, _) = postcard::take_from_bytes::<u32>(bytes).map_err(damaged)?;
        if found != supported {
            return Err(StateError::Version {
                found,
                supported,
                written_by,
            });
        }
        match postcard::take_from_bytes(bytes).map_err(damaged)? {
            (state, []) => Ok(state),
            _ => Err(StateError::Damaged { of }),
        }
    }
}

/// An error of reading a state from bytes.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum StateError {
    /// The bytes do not begin as the state does.
    #[error("the bytes are not the state of {of}: pass what `to_bytes` of the same type returned")]
    NotState {
        /// What the state is of.
        of: &'static str,
    },
    /// The state has another version of the format.
    #[error(
        "the state is in format {found}, but this version of {written_by} reads format {supported}: \
         use the version of {written_by} that wrote it"
    )]
    Version {
        /// The version of the bytes.
        found: u32,
        /// The version that is supported.
        supported: u32,
        /// The crate that writes and reads the state.
        written_by: &'static str,
    },
    /// The bytes are truncated, too many, or not a state.
    #[error(
        "the state of {of} is damaged or truncated: restore it from another copy, or use an older \
         snapshot"
    )]
    Damaged {
        /// What the state is of.
        of: &'static str,
    },
    /// A part of the state is larger or smaller than any that the hypervisor has.
    #[error("the {part} has a size that no vCPU has: the state was not captured from one")]
    Invalid {
        /// The part of the state.
        part: &'static str,
    },
}

#[cfg(all(test, not(ramsnap_loom)))]
mod tests {
    use super::*;

    const FORMAT: StateFormat = StateFormat {
        magic: *b"RSTEST\0\0",
        version: 3,
        of: "a test",
        written_by: "guest-ram",
    };

    #[test]
    fn states_are_read_from_their_bytes() {
        let bytes = FORMAT.encode(&(3_u16, 500_u64));
        // Numbers of any width are written alike.
        assert_eq!(bytes, *b"RSTEST\0\0\x03\xf4\x03");
        assert_eq!(FORMAT.decode(&bytes), Ok((3_u16, 500_u64)));
        assert_eq!(FORMAT.decode(&bytes), Ok((3_u32, 500_u64)));
    }

    #[test]
    fn other_bytes_are_refused() {
        let decode = |bytes: &[u8]| FORMAT.decode::<(u32, u64)>(bytes).unwrap_err();
        let of = "a test";
        assert_eq!(decode(b"RSTEST"), StateError::NotState { of });
        let error = decode(b"RSTEST\0\0\x04\x01");
        assert!(matches!(
            error,
            StateError::Version {
                found: 4,
                supported: 3,
                ..
            }
        ));
        assert!(
            error.to_string().contains("version of guest-ram"),
            "{error}"
        );
        for bytes in [
            &b"RSTEST\0\0"[..],
            b"RSTEST\0\0\x03",
            b"RSTEST\0\0\x03\x01\0",
        ] {
            assert_eq!(decode(bytes), StateError::Damaged { of });
        }
    }
}
