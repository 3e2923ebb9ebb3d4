//! Reads and writes the footer of virtual-machine memory images.
//!
//! A raw memory image does not record which pages of a diff are present, and which are zeros. Only
//! the holes of its file do, and a copy may add or fill holes. A *sealed* image ends in a
//! [`Footer`] that records this. Each run of pages is *present* (its bytes are in the file), *zero*
//! (not in the file, reads as zeros) or, in a diff, *clean* (not in the image). The footer
//! identifies the image and its parent, and has a checksum for each [chunk](CHUNK_SIZE) of RAM.
//!
//! ```
//! use std::fs::File;
//! use image_format::{Footer, ImageId, ImageKind, Layout, Run, Version};
//!
//! # let dir = tempfile::tempdir()?;
//! # let path = dir.path().join("full.mem");
//! # let footer = Footer {
//! #     version: Version::CURRENT,
//! #     id: ImageId::random()?,
//! #     kind: ImageKind::Full,
//! #     layout: Layout::Packed,
//! #     ram_size: 1 << 20,
//! #     page_size: 4096,
//! #     regions: vec![0..1 << 20],
//! #     runs: vec![Run::zeros(0..1 << 20)],
//! #     checksums: Vec::new(),
//! #     metadata: Vec::new(),
//! # };
//! # footer.write(&File::create_new(&path)?)?;
//! // Fails for raw RAM, and for an image that was cut off.
//! let footer = Footer::read(&File::open(&path)?)?;
//! println!("{}: {} bytes present", footer.id, footer.present_bytes());
//! for chunk in footer.chunks() {
//!     // Compare the bytes of `chunk.pieces()` with `chunk.checksum`.
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! There are two placements. *In place*, present pages are at their guest offsets, and the first
//! `ram_size` bytes of the file can be mapped as RAM. *Packed*, they follow a header one after
//! another, and the footer records their positions.
//!
//! A file is never recognized as an image because of bytes that a guest controls, and a file that
//! was cut off at a block boundary is never recognized at all. See
//! [below](#how-a-reader-recognizes-a-file).
//!
//! # Examples
//!
//! **Write a footer** after the pages. Checksums are computed while the pages are written:
//! ```
//! use std::fs::File;
//! use std::os::unix::fs::FileExt;
//!
//! use image_format::{Checksums, Footer, ImageId, ImageKind, Layout, Run, Version, packed_start};
//!
//! # let dir = tempfile::tempdir()?;
//! # let path = dir.path().join("diff.mem");
//! let (ram_size, page_size) = (1 << 30, 4096);
//! let file = File::create_new(&path)?;
//! let page = [7; 4096];
//! let start = packed_start(page_size); // after the header, which the footer writes
//! file.write_all_at(&page, start)?;
//!
//! let mut checksums = Checksums::new(ram_size);
//! checksums.update(8192, &page); // at a guest offset
//! let footer = Footer {
//!     version: Version::CURRENT,
//!     id: ImageId::random()?,
//!     kind: ImageKind::Diff { parent: None },
//!     layout: Layout::Packed,
//!     ram_size,
//!     page_size,
//!     regions: vec![0..ram_size],
//!     runs: vec![Run::present(8192..12288, start), Run::zeros(16384..20480)],
//!     checksums: checksums.finish(),
//!     metadata: b"vCPU state".to_vec(),
//! };
//! footer.write(&file)?;
//!
//! // Read it back. Everything is checked.
//! let read = Footer::read(&File::open(&path)?)?;
//! assert_eq!(read, footer);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//! - [`Footer::write_to`] writes it to a stream, after [`Footer::planned_header`] and the pages.
//! - [`Footer::read_as`] reads an image of version 1 whose length is one that raw RAM can have. The
//!   caller must know the format of the file.
//! - [`Footer::chunks`] returns every chunk with bytes in the file, and the checksum of these
//!   bytes.
//!
//! # Limitations
//! The reader keeps runs and checksums in memory: 32 bytes a run, twice that while the list grows,
//! and 32 bytes for each MiB of present RAM. It allocates memory only for entries that the file
//! has, and refuses a footer of more than [`MAX_FOOTER`] bytes. [`Footer::write_with`] writes runs
//! that are not in memory.

#![doc = include_str!("../FORMAT.md")]
#![forbid(unsafe_code)]

#[cfg(test)]
mod auto_traits;
mod check;
mod checksums;
mod error;
mod extent;
mod extent_map;
mod footer;
mod header;
mod id;
mod layout;
mod read;
mod region_list;
mod run;
mod version;
mod wire;
mod write;
mod write_plan;

pub use check::{check_metadata, check_regions};
pub use checksums::{CHUNK_SIZE, Checksum, Checksums, ChunkSum};
pub use error::{FooterError, InvalidFooter};
pub use extent::Extent;
pub use extent_map::ExtentMap;
pub use footer::{Chunk, Footer, ImageKind};
pub use header::{HEADER_PAGE, Header};
pub use id::{ImageId, ParseIdError};
pub use layout::{Layout, Placement, packed_start};
pub use region_list::RegionList;
pub use run::{Run, Storage};
pub use version::{MAX_RAM_SIZE, RAW_UNIT, Version};
pub use wire::MAX_FOOTER;
pub use write_plan::WritePlan;

/// Compiles the README's example as a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
