//! Serialization of kernel structures as the bytes of their ABI.
//!
//! The ABI of these structures is stable, so their bytes are a file format. Binary formats store a
//! byte string, human-readable formats a string of hexadecimal digits. Deserialization requires the
//! exact length: the implementation of `kvm-bindings` silently truncates or zero-fills.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{self, Deserializer, Visitor};
use serde::{Deserialize, Serialize, Serializer};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Serializes the bytes of `T`; for fields with `#[serde(with = "abi")]`.
pub(super) fn serialize<T: IntoBytes + Immutable + ?Sized, S: Serializer>(
    value: &T,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    let bytes = value.as_bytes();
    if !serializer.is_human_readable() {
        return serializer.serialize_bytes(bytes);
    }
    let mut digits = String::with_capacity(2 * bytes.len());
    for byte in bytes {
        for nibble in [byte >> 4, byte & 15] {
            digits.extend(char::from_digit(nibble.into(), 16));
        }
    }
    serializer.serialize_str(&digits)
}

/// Deserializes a `T` from exactly its bytes.
pub(super) fn deserialize<'de, T: FromBytes, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<T, D::Error> {
    let bytes = bytes::deserialize(deserializer)?;
    T::read_from_bytes(&bytes)
        .map_err(|_| de::Error::invalid_length(bytes.len(), &Size(size_of::<T>(), "exactly ")))
}

/// Optional structures, for fields with `#[serde(with = "abi::option")]`.
pub(super) mod option {
    use super::{Abi, Deserialize, Deserializer, FromBytes, Immutable, IntoBytes, Serialize};
    use serde::Serializer;

    pub(crate) fn serialize<T: IntoBytes + Immutable, S: Serializer>(
        value: &Option<T>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        value.as_ref().map(Abi).serialize(serializer)
    }

    pub(crate) fn deserialize<'de, T: FromBytes, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<T>, D::Error> {
        Option::<Abi<T>>::deserialize(deserializer).map(|value| value.map(|Abi(value)| value))
    }
}

/// Arrays of structures as one string of bytes, for fields with `#[serde(with = "abi::list")]`.
pub(super) mod list {
    use super::{Deserializer, FromBytes, Immutable, IntoBytes, Serializer, Size, bytes, de};

    pub(crate) fn serialize<T: IntoBytes + Immutable, S: Serializer>(
        values: &[T],
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        super::serialize(values, serializer)
    }

    pub(crate) fn deserialize<'de, T: FromBytes, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<T>, D::Error> {
        let bytes = bytes::deserialize(deserializer)?;
        let values = bytes.chunks(size_of::<T>()).map(T::read_from_bytes);
        values.collect::<Result<_, _>>().map_err(|_| {
            de::Error::invalid_length(bytes.len(), &Size(size_of::<T>(), "a multiple of "))
        })
    }
}

/// Deserialization of any number of bytes.
mod bytes {
    use super::{Bytes, Deserializer, PhantomData};

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<u8>, D::Error> {
        let visitor = Bytes(PhantomData);
        if deserializer.is_human_readable() {
            deserializer.deserialize_str(visitor)
        } else {
            deserializer.deserialize_byte_buf(visitor)
        }
    }
}

struct Bytes(PhantomData<()>);

impl Visitor<'_> for Bytes {
    type Value = Vec<u8>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the bytes of a kernel structure, as such or as hexadecimal digits")
    }

    fn visit_bytes<E: de::Error>(self, bytes: &[u8]) -> Result<Vec<u8>, E> {
        Ok(bytes.to_vec())
    }

    fn visit_byte_buf<E: de::Error>(self, bytes: Vec<u8>) -> Result<Vec<u8>, E> {
        Ok(bytes)
    }

    fn visit_str<E: de::Error>(self, digits: &str) -> Result<Vec<u8>, E> {
        let value = |digit: u8| char::from(digit).to_digit(16);
        let (pairs, odd) = digits.as_bytes().as_chunks::<2>();
        let bytes = pairs
            .iter()
            .map(|[high, low]| Some((value(*high)? << 4 | value(*low)?) as u8));
        match bytes.collect() {
            Some(bytes) if odd.is_empty() => Ok(bytes),
            _ => Err(E::invalid_value(de::Unexpected::Str(digits), &self)),
        }
    }
}

struct Size(usize, &'static str);

impl de::Expected for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{} bytes", self.1, self.0)
    }
}

struct Abi<T>(T);

impl<T: IntoBytes + Immutable> Serialize for Abi<&T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serialize(self.0, serializer)
    }
}

impl<'de, T: FromBytes> Deserialize<'de> for Abi<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserialize(deserializer).map(Self)
    }
}

/// The version of a format, serialized as the first field. Another version is an error before any
/// other field is misread.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct FormatVersion<const CURRENT: u32>;

impl<const CURRENT: u32> Serialize for FormatVersion<CURRENT> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u32(CURRENT)
    }
}

impl<'de, const CURRENT: u32> Deserialize<'de> for FormatVersion<CURRENT> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match u32::deserialize(deserializer)? {
            version if version == CURRENT => Ok(Self),
            version => Err(de::Error::custom(format_args!(
                "state in format {version}, but this version of kvm-backend reads format \
                 {CURRENT}: use the version of kvm-backend that wrote it"
            ))),
        }
    }
}
