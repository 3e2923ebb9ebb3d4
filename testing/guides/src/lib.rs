//! Compiles and runs the examples of the pages in `docs/guides`.

#[cfg(doctest)]
#[doc = include_str!("../../../docs/guides/firecracker-files.md")]
mod firecracker_files {}

#[cfg(all(doctest, target_os = "linux"))]
#[doc = include_str!("../../../docs/guides/squib-snapshot.md")]
mod squib_snapshot {}
