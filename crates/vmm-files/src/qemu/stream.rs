//! The head of a migration stream, up to the last RAM block.

use crate::error::OpenError;
use crate::mapped_pages::MappedPages;
use crate::source::Source;

/// More RAM blocks than any guest has.
const MAX_BLOCKS: usize = 4096;
/// More capabilities than QEMU has.
const MAX_CAPABILITIES: u32 = 256;
/// More bytes than the name of a machine type has.
const MAX_NAME: u32 = 1024;

const CONFIGURATION: u8 = 0x07;
const SUBSECTION: u8 = 0x05;
const SECTION_START: u8 = 0x01;
const COMMAND: u8 = 0x08;
/// The flag of the first field of the section `ram`, beside the sum of the lengths.
const MEM_SIZE: u64 = 0x04;

/// What is known of the guest before the state of its devices.
#[derive(Debug)]
pub(super) struct Stream {
    /// The machine type, such as `pc-q35-9.2`, and its position.
    pub(super) machine: String,
    pub(super) machine_at: u64,
    /// At least one.
    pub(super) blocks: Vec<Block>,
    pub(super) blocks_at: u64,
}

/// A RAM block.
#[derive(Debug)]
pub(super) struct Block {
    pub(super) name: String,
    /// The position of the name.
    pub(super) at: u64,
    /// At least 1.
    pub(super) len: u64,
    /// `None` for shared memory that was left out.
    pub(super) pages: Option<MappedPages>,
}

#[derive(Debug, Default)]
struct Capabilities {
    mapped_ram: bool,
    /// Blocks have an address too.
    ignore_shared: bool,
}

impl Stream {
    /// Reads the stream that begins at a position in the file.
    pub(super) fn read(source: &Source, start: u64) -> Result<Self, OpenError> {
        let mut fields = Fields { source, at: start };
        if &fields.bytes::<4>()? != b"QEVM" {
            return Err(source.invalid(
                start,
                "no migration stream of QEMU begins here: name its format",
            ));
        }
        let version = fields.u32()?;
        if version != 3 {
            let problem = format!("its version is {version}, and only version 3 is supported");
            return Err(source.invalid(start + 4, problem));
        }
        let (machine, machine_at, capabilities) = fields.configuration()?;
        if !capabilities.mapped_ram {
            let problem = "it was saved without the capability mapped-ram, so pages have no fixed places: save \
                           the guest with migrate_set_capability mapped-ram on (QEMU 9.0)";
            return Err(source.invalid(machine_at, problem));
        }
        fields.begin_ram()?;
        let blocks_at = fields.at;
        let blocks = fields.blocks(capabilities.ignore_shared)?;
        Ok(Self {
            machine,
            machine_at,
            blocks,
            blocks_at,
        })
    }
}

/// Reads fields one after another.
struct Fields<'s> {
    source: &'s Source,
    at: u64,
}

impl Fields<'_> {
    fn bytes<const N: usize>(&mut self) -> Result<[u8; N], OpenError> {
        let bytes = self.source.bytes(self.at)?;
        self.at += N as u64;
        Ok(bytes)
    }

    fn u8(&mut self) -> Result<u8, OpenError> {
        Ok(self.bytes::<1>()?[0])
    }

    fn u32(&mut self) -> Result<u32, OpenError> {
        Ok(u32::from_be_bytes(self.bytes()?))
    }

    fn u64(&mut self) -> Result<u64, OpenError> {
        Ok(u64::from_be_bytes(self.bytes()?))
    }

    fn skip(&mut self, len: u64) -> Result<(), OpenError> {
        self.source.check_range(self.at, len, self.at)?;
        self.at += len;
        Ok(())
    }

    /// Returns text of a length that is known to be small.
    fn text(&mut self, len: usize) -> Result<String, OpenError> {
        let mut bytes = vec![0; len];
        self.source.read(self.at, &mut bytes)?;
        self.at += len as u64;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Returns a name, whose length is in one byte before it.
    fn name(&mut self) -> Result<String, OpenError> {
        let len = self.u8()?;
        self.text(len.into())
    }

    /// Returns the machine type, its position, and the capabilities.
    fn configuration(&mut self) -> Result<(String, u64, Capabilities), OpenError> {
        let at = self.at;
        if self.u8()? != CONFIGURATION {
            let problem = "it has no configuration, which names the machine type: save the guest with a newer \
                           machine type";
            return Err(self.source.invalid(at, problem));
        }
        let len = self.u32()?;
        if len > MAX_NAME {
            let problem =
                format!("the name of the machine type has {len} bytes: the file is damaged");
            return Err(self.source.invalid(at + 1, problem));
        }
        let machine_at = self.at;
        let machine = self.text(len as usize)?;
        let mut capabilities = Capabilities::default();
        loop {
            let at = self.at;
            if self.u8()? != SUBSECTION {
                self.at = at;
                return Ok((machine, machine_at, capabilities));
            }
            let name = self.name()?;
            let _version = self.u32()?;
            match name.as_str() {
                "configuration/capabilities" => capabilities = self.capabilities()?,
                "configuration/target-page-bits" => self.skip(4)?,
                "configuration/uuid" => self.skip(16)?,
                _ => {
                    let problem =
                        format!("the subsection {name:?} is not known: use a newer ramsnap");
                    return Err(self.source.invalid(at, problem));
                }
            }
        }
    }

    fn capabilities(&mut self) -> Result<Capabilities, OpenError> {
        let at = self.at;
        let count = self.u32()?;
        if count > MAX_CAPABILITIES {
            let problem = format!("it has {count} capabilities: the file is damaged");
            return Err(self.source.invalid(at, problem));
        }
        let mut found = Capabilities::default();
        for _ in 0..count {
            match self.name()?.as_str() {
                "mapped-ram" => found.mapped_ram = true,
                "x-ignore-shared" => found.ignore_shared = true,
                _ => {}
            }
        }
        Ok(found)
    }

    /// Passes over commands up to the fields of the section `ram`.
    fn begin_ram(&mut self) -> Result<(), OpenError> {
        loop {
            let at = self.at;
            match self.u8()? {
                COMMAND => {
                    self.skip(2)?;
                    let len = u16::from_be_bytes(self.bytes()?);
                    self.skip(len.into())?;
                }
                SECTION_START => {
                    let _id = self.u32()?;
                    let name = self.name()?;
                    let (_instance, version) = (self.u32()?, self.u32()?);
                    return match (name.as_str(), version) {
                        ("ram", 4) => Ok(()),
                        ("ram", _) => {
                            let problem = format!(
                                "the section ram has version {version}, and only version 4 is supported"
                            );
                            Err(self.source.invalid(at, problem))
                        }
                        _ => {
                            let problem = format!(
                                "the section {name:?} precedes the RAM, which is not supported: detach the \
                                 device before the save"
                            );
                            Err(self.source.invalid(at, problem))
                        }
                    };
                }
                kind => {
                    let problem = format!(
                        "a section of kind {kind:#x} precedes the RAM, which is not supported: detach \
                         virtio-mem devices before the save"
                    );
                    return Err(self.source.invalid(at, problem));
                }
            }
        }
    }

    fn blocks(&mut self, have_addresses: bool) -> Result<Vec<Block>, OpenError> {
        let at = self.at;
        let total = self.u64()?;
        if total & 0xfff != MEM_SIZE {
            let problem =
                "the section ram does not begin with the size of the RAM: the file is damaged";
            return Err(self.source.invalid(at, problem));
        }
        let mut left = total & !0xfff;
        let mut blocks = Vec::new();
        while left > 0 {
            if blocks.len() == MAX_BLOCKS {
                let problem =
                    format!("it has more than {MAX_BLOCKS} RAM blocks, which is not supported");
                return Err(self.source.invalid(self.at, problem));
            }
            let block = self.block(have_addresses)?;
            let Some(rest) = left.checked_sub(block.len) else {
                let problem = "the RAM blocks have more bytes than their sum: the file is damaged, or it was \
                               saved with other capabilities (postcopy-ram) and huge pages";
                return Err(self.source.invalid(block.at, problem));
            };
            left = rest;
            blocks.push(block);
        }
        match blocks.is_empty() {
            true => Err(self
                .source
                .invalid(at, "it has no RAM: the file is damaged")),
            false => Ok(blocks),
        }
    }

    fn block(&mut self, has_address: bool) -> Result<Block, OpenError> {
        let at = self.at;
        let name = self.name()?;
        let len = self.u64()?;
        if len == 0 || !len.is_multiple_of(4096) {
            let problem = format!("the RAM block {name:?} has {len} bytes: the file is damaged");
            return Err(self.source.invalid(at, problem));
        }
        if has_address {
            self.skip(8)?;
        }
        let header = self.at;
        let version = self.u32()?;
        if version != 1 {
            let problem =
                format!("the pages have version {version}, and only version 1 is supported");
            return Err(self.source.invalid(header, problem));
        }
        let (page_size, bitmap_at, pages_at) = (self.u64()?, self.u64()?, self.u64()?);
        // QEMU 11.0 and newer: blocks that are left out have no places.
        if (bitmap_at, pages_at) == (0, 0) {
            let pages = None;
            return Ok(Block {
                name,
                at,
                len,
                pages,
            });
        }
        if !page_size.is_power_of_two() || !(512..=1 << 21).contains(&page_size) {
            let problem = format!("its pages have {page_size} bytes: the file is damaged");
            return Err(self.source.invalid(header + 4, problem));
        }
        let words = len.div_ceil(page_size).div_ceil(64);
        self.source.check_range(bitmap_at, words * 8, header + 12)?;
        self.source.check_range(pages_at, len, header + 20)?;
        self.at = pages_at + len;
        Ok(Block {
            name,
            at,
            len,
            pages: Some(MappedPages {
                bitmap_at,
                pages_at,
                page_size,
            }),
        })
    }
}
