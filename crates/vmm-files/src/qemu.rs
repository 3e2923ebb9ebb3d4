//! Migration streams of QEMU with the capability `mapped-ram`, alone or in a file of libvirt.
//!
//! A stream is a sequence of big-endian fields: the magic number `QEVM` and the version 3, a
//! configuration (the machine type and the capabilities), and sections. The first section is named
//! `ram`. It has the sum of the lengths of all RAM blocks, and for each block its name, its length,
//! and a header of `mapped-ram`: the version 1, the page size, the position of a bitmap and that of
//! the pages. Both positions are counted from the start of the file. The next block follows the
//! place of the last page. Everything after the last block (the other sections, with the state of
//! devices) is not read.
//!
//! libvirt puts its own header, the XML of the domain and a padding in front of the stream.

mod stream;

use std::path::Path;

use page_reader::RamLayout;

use crate::error::OpenError;
use crate::format::Format;
use crate::guest_file::{Contents, GuestFileOptions, Part, Stored};
use crate::machine::Machine;
use crate::source::{Source, le};
use stream::{Block, Stream};

/// The names of the RAM of machines without a memory backend.
const MACHINE_RAM: [&str; 3] = ["pc.ram", "microvm.ram", "mach-virt.ram"];

const LIBVIRT_MAGIC: &[u8; 16] = b"LibvirtQemudSave";
/// A save that libvirt has begun and not finished.
const LIBVIRT_PARTIAL: &[u8; 16] = b"LibvirtQemudPart";
const LIBVIRT_HEADER: u64 = 92;
/// The names of the formats of libvirt, by their number.
const LIBVIRT_FORMATS: [&str; 7] = ["raw", "gzip", "bzip2", "xz", "lzop", "zstd", "sparse"];
const SPARSE: u64 = 6;

pub(crate) fn read(path: &Path, options: &GuestFileOptions) -> Result<Contents, OpenError> {
    contents(Source::open(path, Format::Qemu)?, 0, options)
}

/// Reads a file of libvirt, which is a header of host-endian numbers of 32 bits (version, length of
/// XML and padding, whether the guest ran, format, offset of a cookie, 14 unused), the XML, and a
/// stream.
pub(crate) fn read_libvirt(path: &Path, options: &GuestFileOptions) -> Result<Contents, OpenError> {
    let source = Source::open(path, Format::Libvirt)?;
    let header: [u8; LIBVIRT_HEADER as usize] = source.bytes(0)?;
    if header.starts_with(LIBVIRT_PARTIAL) {
        return Err(source.invalid(
            0,
            "the save was interrupted and is incomplete: save the guest again",
        ));
    }
    if !header.starts_with(LIBVIRT_MAGIC) {
        return Err(source.invalid(
            0,
            "it does not begin with the magic number of libvirt: name its format",
        ));
    }
    match le::<4>(&header, 16) {
        2 => {}
        0x0200_0000 => {
            let problem =
                "it was written on a big-endian host, and only little-endian guests are supported";
            return Err(source.invalid(16, problem));
        }
        version => {
            let problem = format!("its version is {version}, and only version 2 is supported");
            return Err(source.invalid(16, problem));
        }
    }
    let (xml, format) = (le::<4>(&header, 20), le::<4>(&header, 28));
    if format != SPARSE {
        let name = LIBVIRT_FORMATS.get(format as usize).unwrap_or(&"unknown");
        let problem = format!(
            "its image format is {name}, whose memory has no fixed places: save the guest with the image format \
             sparse (virsh save --image-format sparse, libvirt 11.2)"
        );
        return Err(source.invalid(28, problem));
    }
    contents(source, LIBVIRT_HEADER + xml, options)
}

fn contents(source: Source, start: u64, options: &GuestFileOptions) -> Result<Contents, OpenError> {
    let stream = Stream::read(&source, start)?;
    let blocks = ram_blocks(&source, &stream, options)?;
    let mut ram_size = 0_u64;
    let mut parts = Vec::with_capacity(blocks.len());
    for block in blocks {
        let Some(pages) = block.pages else {
            let problem = format!(
                "the RAM block {:?} is not in the file, because it is shared memory and the capability \
                 x-ignore-shared was set: dump its memory backend instead",
                block.name
            );
            return Err(source.invalid(block.at, problem));
        };
        parts.push(Part {
            start: ram_size,
            len: block.len,
            source: 0,
            stored: Stored::Pages(pages),
        });
        // Each block is inside the file.
        ram_size = ram_size.saturating_add(block.len);
    }
    let layout = layout(&source, &stream, options, ram_size)?;
    Ok(Contents {
        sources: vec![source],
        layout,
        parts,
    })
}

/// Returns the blocks that are the RAM of the guest, in the order of their addresses. The other
/// blocks are ROMs and memory of devices.
fn ram_blocks<'s>(
    source: &Source,
    stream: &'s Stream,
    options: &GuestFileOptions,
) -> Result<Vec<&'s Block>, OpenError> {
    let named = |name: &str| stream.blocks.iter().find(|block| block.name == name);
    let names = || {
        let names = stream.blocks.iter().map(|block| block.name.as_str());
        names.collect::<Vec<_>>().join(", ")
    };
    if options.blocks.is_empty() {
        return match MACHINE_RAM.iter().find_map(|name| named(name)) {
            Some(block) => Ok(vec![block]),
            None => {
                let problem = format!(
                    "none of its RAM blocks has the name of a machine's RAM: name the blocks of the memory \
                     backends, of: {}",
                    names()
                );
                Err(source.invalid(stream.blocks_at, problem))
            }
        };
    }
    let block = |name: &String| {
        named(name).ok_or_else(|| {
            let problem = format!("it has no RAM block {name:?}: name one of: {}", names());
            source.invalid(stream.blocks_at, problem)
        })
    };
    options.blocks.iter().map(block).collect()
}

fn layout(
    source: &Source,
    stream: &Stream,
    options: &GuestFileOptions,
    ram_size: u64,
) -> Result<RamLayout, OpenError> {
    if let Some(layout) = &options.layout {
        if layout.ram_size() != ram_size {
            let problem = format!(
                "its RAM has {ram_size} bytes, and the regions that were given have {}: give the regions of \
                 this guest",
                layout.ram_size()
            );
            return Err(source.invalid(stream.blocks_at, problem));
        }
        return Ok(layout.clone());
    }
    let machine = options.machine.or(Machine::of_qemu(&stream.machine));
    let Some(machine) = machine else {
        let problem = format!(
            "the addresses of the RAM of the machine type {:?} are not known: name a machine or the regions",
            stream.machine
        );
        return Err(source.invalid(stream.machine_at, problem));
    };
    machine.layout(ram_size).map_err(|error| OpenError::Layout {
        path: source.path.clone(),
        source: error,
    })
}
