//! Examples of the crates in programs of other kinds, such as programs with an async runtime. The
//! code in `docs/guides` is compiled and run as documentation tests of this crate.

#[cfg(doctest)]
#[doc = include_str!("../../../docs/guides/async.md")]
struct Async;

#[cfg(doctest)]
#[doc = include_str!("../../../docs/guides/firecracker-files.md")]
struct FirecrackerFiles;

#[cfg(doctest)]
#[doc = include_str!("../../../docs/guides/fuzzers.md")]
struct Fuzzers;

#[cfg(all(doctest, target_os = "linux"))]
#[doc = include_str!("../../../docs/guides/squib-snapshot.md")]
struct SquibSnapshot;
