//! Reads and writes the memory files of virtual-machine monitors and of tools that analyze memory.
//!
//! Each VMM saves the RAM of its guests in a format of its own. A file of RAM alone says nothing of
//! the addresses that its bytes had. This crate reads such files as a [`PageReader`] with a
//! [`RamLayout`], so that code for one source works with all of them, and it writes the files that
//! debuggers and tools of forensics read.
//!
//! ```
//! use std::ops::ControlFlow;
//!
//! use page_reader::{PageReader, RamLayout};
//! use vmm_files::{ElfMachine, FilePlan, Format, GuestFile, Machine, WriteOptions};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let dir = tempfile::tempdir()?;
//! # let path = dir.path().join("guest.elf");
//! # let ram = vec![7; 1 << 20];
//! // Write the RAM of a guest of QEMU as an ELF core,
//! let layout = Machine::QemuQ35.layout(1 << 20)?;
//! let plan = FilePlan::elf(&layout, ElfMachine::X86_64, &[])?;
//! let file = std::fs::File::create_new(&path)?;
//! plan.write(&file, &ram, &WriteOptions::new(), true, &mut |_| ControlFlow::Continue(()))?;
//!
//! // and read it again.
//! let guest = GuestFile::open(&path, Format::Elf)?;
//! assert_eq!(guest.layout(), &layout);
//! let mut byte = [0];
//! guest.read_at(4096, &mut byte)?;
//! assert_eq!(byte, [7]);
//! # Ok(())
//! # }
//! ```
//!
//! # Formats
//!
//! | format | read | written | addresses |
//! |---|---|---|---|
//! | ELF core of guest-physical memory | [`Format::Elf`] | [`FilePlan::elf`] | in the file |
//! | QEMU, `mapped-ram` | [`Format::Qemu`] | - | of the machine type in the file |
//! | libvirt, `virsh save` as `sparse` | [`Format::Libvirt`] | - | of the machine type in the file |
//! | Cloud Hypervisor, snapshot directory | [`Format::CloudHypervisor`] | [`FilePlan::flat`] | in `state.json` |
//! | VMware, `.vmem` with `.vmsn` or `.vmss` | [`Format::Vmware`] | - | in the `.vmsn` file |
//! | LiME | - | [`FilePlan::lime`] | in the file |
//! | Firecracker, and other raw memory | `FileReader` of `page-reader` | any file writer | of the [`Machine`] |
//!
//! The state of vCPUs and devices in the files is not read: it belongs to one version of one VMM.
//! Keep it beside the memory, or as the metadata of an image.
//!
//! # What is checked
//!
//! Files may come from anybody. Each length and position is checked against the length of the file,
//! without overflow, before it is used. Lists have a fixed maximum, and bitmaps are read in parts.
//! So memory use is bounded: about 100 MiB for the segments of an ELF core, and twice 64 MiB for
//! `state.json`. An error names the file, the position and what can be done.
//!
//! A format is [detected](Format::detect) by magic numbers only. Raw memory has none: a guest can
//! write any bytes there, so a raw file is never opened by detection.
//!
//! # Limitations
//!
//! - Files of big-endian hosts and guests, and 32-bit ELF cores, are not read.
//! - Streams of QEMU without `mapped-ram` and compressed files of libvirt are not read: pages have
//!   no fixed places in them.
//! - kdump's compressed format (`makedumpfile`, `virsh dump --format kdump-zlib`) is not read.
//! - The layouts of machine types are those of default settings: see [`Machine`].
//! - A file that is changed and gets its old length and time of modification again is not noticed.

mod cloud_hypervisor;
mod elf;
mod error;
mod file_plan;
mod format;
mod guest_file;
mod lime;
mod machine;
mod mapped_pages;
mod qemu;
mod source;
mod vmcoreinfo;
mod vmware;

// The types in public signatures.
pub use page_reader::{LayoutError, PageReader, RamLayout};
pub use sparse_file::{Progress, ProgressFn, SpaceError, WriteError, WriteOptions};

pub use cloud_hypervisor::CloudHypervisorSnapshot;
pub use elf::ElfMachine;
pub use error::{FileWriteError, OpenError, PlanError};
pub use file_plan::FilePlan;
pub use format::Format;
pub use guest_file::{GuestFile, GuestFileOptions};
pub use machine::Machine;
pub use vmcoreinfo::find_vmcoreinfo;

/// Compiles the README's example as a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
