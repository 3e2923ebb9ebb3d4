//! ELF cores of guest-physical memory.
//!
//! A core is an ELF64 file of type `ET_CORE`. Each `PT_LOAD` segment is a range of guest-physical
//! addresses, whose start is in `p_paddr`. A `PT_NOTE` segment has notes for debuggers. If there
//! are 65,535 segments or more, `e_phnum` is `PN_XNUM`, and the number is in the field `sh_info` of
//! the first section header.

mod read;
mod write;

pub(crate) use read::read;
pub(crate) use write::plan;

/// The length of the header of the file.
const HEADER: u64 = 64;
/// The length of a program header.
const SEGMENT: u64 = 56;
/// The length of a section header.
const SECTION: u64 = 64;

const ET_CORE: u16 = 4;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// The value of `e_phnum` if the number of segments is in the first section header.
const PN_XNUM: u16 = 0xffff;

/// The processor that an ELF core is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ElfMachine {
    /// x86-64.
    X86_64,
    /// arm64.
    Aarch64,
    /// 64-bit RISC-V.
    Riscv64,
}

impl ElfMachine {
    /// All machines.
    pub const ALL: [Self; 3] = [Self::X86_64, Self::Aarch64, Self::Riscv64];

    /// Returns the machine that this program was built for, or `None` if it is another one.
    #[must_use]
    pub fn of_host() -> Option<Self> {
        let is_host = |machine: &Self| machine.name() == std::env::consts::ARCH;
        Self::ALL.into_iter().find(is_host)
    }

    /// Returns the name: `x86_64`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64",
            Self::Aarch64 => "aarch64",
            Self::Riscv64 => "riscv64",
        }
    }

    /// Returns the value of `e_machine`.
    fn number(self) -> u16 {
        match self {
            Self::X86_64 => 62,
            Self::Aarch64 => 183,
            Self::Riscv64 => 243,
        }
    }
}
