//! Files of other VMMs and of debuggers.

use std::path::PathBuf;

use clap::Args;
use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use vmm_files::{ElfMachine, Format, Machine};

/// A format that is written in place of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum To {
    Elf,
    Lime,
    Firecracker,
    CloudHypervisor,
}

impl To {
    const ALL: [Self; 4] = [
        Self::Elf,
        Self::Lime,
        Self::Firecracker,
        Self::CloudHypervisor,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Elf => "elf",
            Self::Lime => "lime",
            Self::Firecracker => "firecracker",
            Self::CloudHypervisor => "cloud-hypervisor",
        }
    }

    /// Returns what the output is, in words.
    pub fn noun(self) -> &'static str {
        match self {
            Self::Elf => "ELF core",
            Self::Lime => "LiME file",
            Self::Firecracker => "memory file for Firecracker",
            Self::CloudHypervisor => "snapshot directory for Cloud Hypervisor",
        }
    }

    fn parser() -> impl TypedValueParser<Value = Self> {
        let value = |to: Self| {
            PossibleValue::new(to.name()).help(match to {
                Self::Elf => "An ELF core of guest-physical memory, for gdb, crash and drgn",
                Self::Lime => "A header and the memory of each region, for Volatility",
                Self::Firecracker => "The memory file of a Firecracker snapshot",
                Self::CloudHypervisor => "A snapshot directory, with the state in --snapshot",
            })
        };
        named(Self::ALL, value, Self::name)
    }
}

/// Returns the parser of `--guest`.
pub fn machines() -> impl TypedValueParser<Value = Machine> {
    let value = |machine: Machine| PossibleValue::new(machine.name());
    named(Machine::ALL, value, Machine::name)
}

/// Returns the value of `--format` for a format, with its description.
pub fn format_value(format: Format) -> PossibleValue {
    PossibleValue::new(format.name()).help(match format {
        Format::Elf => "Only convert: an ELF core (virsh dump --memory-only)",
        Format::Qemu => "Only convert: a file of QEMU's migration with mapped-ram",
        Format::Libvirt => "Only convert: a file of virsh save --image-format sparse",
        Format::CloudHypervisor => "Only convert: a snapshot directory of Cloud Hypervisor",
        Format::Vmware => "Only convert: a .vmem file beside its .vmsn or .vmss file",
        _ => "Only convert",
    })
}

/// Returns a parser of the names of some values.
fn named<T: Copy + Send + Sync + 'static, const N: usize>(
    all: [T; N],
    value: impl Fn(T) -> PossibleValue,
    name: fn(T) -> &'static str,
) -> impl TypedValueParser<Value = T> {
    PossibleValuesParser::new(all.map(value)).try_map(move |text| {
        let found = all.into_iter().find(|it| name(*it) == text);
        found.ok_or("no such value")
    })
}

/// What files of other VMMs need, beside a path.
#[derive(Clone, Debug, Default, Args)]
pub struct VmmFiles {
    /// Write a file of another program in place of an image
    #[arg(
        long,
        value_name = "FORMAT",
        value_parser = To::parser(),
        conflicts_with_all = ["layout", "metadata", "zstd", "raw_diff", "page_size"],
    )]
    pub to: Option<To>,
    /// The processor that the ELF core states; by default that of --guest, or of this host
    #[arg(
        long,
        requires = "to",
        value_parser = named(
            ElfMachine::ALL, |it| PossibleValue::new(it.name()), ElfMachine::name
        ),
    )]
    pub machine: Option<ElfMachine>,
    /// The snapshot directory of the same guest whose config.json and state.json are copied
    #[arg(
        long,
        value_name = "DIR",
        required_if_eq("to", "cloud-hypervisor"),
        requires = "to"
    )]
    pub snapshot: Option<PathBuf>,
    /// A RAM block of a file of QEMU or libvirt whose guest has memory backends; repeat it in the
    /// order of the addresses
    #[arg(long, value_name = "NAME")]
    pub ram_block: Vec<String>,
}
