//! Formats before a path that are not read.

use std::path::Path;

use super::Format;
use crate::failure::FormatFailure;

/// Refuses a path that does not exist and begins like a format, as `lime:FILE`.
pub(super) fn check(path: &Path) -> Result<(), FormatFailure> {
    let Some((prefix, _)) = path.to_str().and_then(|text| text.split_once(':')) else {
        return Ok(());
    };
    let may_be_format = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
    if prefix.is_empty() || !prefix.bytes().all(may_be_format) || path.symlink_metadata().is_ok() {
        return Ok(());
    }
    let path = path.to_owned();
    let names: Vec<_> = Format::all().map(Format::name).collect();
    let formats = names.join(", ");
    Err(match prefix.to_ascii_lowercase().as_str() {
        "lime" => FormatFailure::LimeIsWritten { path, formats },
        "firecracker" => FormatFailure::FirecrackerIsRaw { path, formats },
        _ => FormatFailure::UnknownFormat {
            path,
            prefix: prefix.to_owned(),
            formats,
        },
    })
}
