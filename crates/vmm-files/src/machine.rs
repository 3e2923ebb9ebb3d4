//! The guest-physical RAM layouts of common virtual machines.

use page_reader::{LayoutError, RamLayout};

const GIB: u64 = 1 << 30;

/// A kind of virtual machine whose RAM layout follows from the size of its RAM.
///
/// Those of QEMU for x86-64 are the same as in `info mtree` of QEMU 10.0.
///
/// The layouts are those of the default settings. Memory that is hot-plugged, and options that move
/// RAM, change them: give the regions explicitly then. In QEMU these are `max-ram-below-4g`,
/// `pc-dimm` and `virtio-mem` devices, and on hosts with AMD processors RAM of about 1,012 GiB and
/// more on `pc` and `q35`.
///
/// # Examples
/// ```
/// use vmm_files::Machine;
///
/// let layout = Machine::QemuQ35.layout(6 << 30)?;
/// assert_eq!(layout.to_string(), "0x0..0x80000000, 0x100000000..0x200000000");
/// # Ok::<(), page_reader::LayoutError>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Machine {
    /// Firecracker on x86-64: RAM from 0 to 3 GiB, from 4 to 256 GiB, and from 512 GiB.
    ///
    /// From `arch_memory_regions` and `layout.rs` in `src/vmm/src/arch/x86_64`: the gaps are
    /// `MMIO32_MEM_START` (3 GiB) with `MMIO32_MEM_SIZE` (1 GiB), and `MMIO64_MEM_START` (256 GiB)
    /// with `MMIO64_MEM_SIZE` (256 GiB).
    Firecracker,
    /// Firecracker on arm64: RAM from 2 to 256 GiB, and from 512 GiB.
    ///
    /// From `src/vmm/src/arch/aarch64/layout.rs`: `DRAM_MEM_START` (2 GiB), `MMIO64_MEM_START` and
    /// `MMIO64_MEM_SIZE` (256 GiB each).
    FirecrackerArm64,
    /// QEMU's `pc` (i440FX): less than 3.5 GiB of RAM are one region from 0. More RAM is divided:
    /// 3 GiB from 0, and the rest from 4 GiB.
    ///
    /// From `pc_init1` in `hw/i386/pc_piix.c`: the limit is 0xe0000000, and the first region of a
    /// larger RAM has 0xc0000000 bytes, so that both regions are aligned to 1 GiB. Machine types
    /// of before version 2.0 differ.
    QemuPc,
    /// QEMU's `q35`: less than 2.75 GiB of RAM are one region from 0. More RAM is divided: 2 GiB
    /// from 0, and the rest from 4 GiB.
    ///
    /// From `pc_q35_init` in `hw/i386/pc_q35.c`: the limit is 0xb0000000, and the first region of a
    /// larger RAM has 0x80000000 bytes.
    QemuQ35,
    /// QEMU's `microvm`: RAM from 0 to 3 GiB, and from 4 GiB.
    ///
    /// From `microvm_memory_init` in `hw/i386/microvm.c`, since QEMU 5.2.
    QemuMicrovm,
    /// QEMU's `virt` of arm64: one region from 1 GiB.
    ///
    /// From the entry `VIRT_MEM` of `base_memmap` in `hw/arm/virt.c`.
    QemuVirt,
}

impl Machine {
    /// All machines.
    pub const ALL: [Self; 6] = [
        Self::Firecracker,
        Self::FirecrackerArm64,
        Self::QemuPc,
        Self::QemuQ35,
        Self::QemuMicrovm,
        Self::QemuVirt,
    ];

    /// Returns the name, as command lines use it: `qemu-q35`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Firecracker => "firecracker",
            Self::FirecrackerArm64 => "firecracker-arm64",
            Self::QemuPc => "qemu-pc",
            Self::QemuQ35 => "qemu-q35",
            Self::QemuMicrovm => "qemu-microvm",
            Self::QemuVirt => "qemu-virt",
        }
    }

    /// Returns the machine of a machine type of QEMU, such as `pc-q35-9.2`, or `None` if its layout
    /// is not known.
    #[must_use]
    pub fn of_qemu(machine_type: &str) -> Option<Self> {
        let is_version_of = |name: &str| {
            let version = machine_type.strip_prefix(name);
            version.is_some_and(|version| version.starts_with(|c: char| c.is_ascii_digit()))
        };
        match machine_type {
            "microvm" => Some(Self::QemuMicrovm),
            _ if is_version_of("pc-i440fx-") => Some(Self::QemuPc),
            _ if is_version_of("pc-q35-") => Some(Self::QemuQ35),
            _ if is_version_of("virt-") => Some(Self::QemuVirt),
            _ => None,
        }
    }

    /// Returns whether guests are x86-64. The others are arm64.
    #[must_use]
    pub fn is_x86(self) -> bool {
        match self {
            Self::Firecracker | Self::QemuPc | Self::QemuQ35 | Self::QemuMicrovm => true,
            Self::FirecrackerArm64 | Self::QemuVirt => false,
        }
    }

    /// Returns the layout of `ram_size` bytes of RAM.
    ///
    /// # Errors
    /// Returns an error if the size is 0, not a multiple of 4 KiB, or exceeds the address space.
    pub fn layout(self, ram_size: u64) -> Result<RamLayout, LayoutError> {
        // The places of RAM in ascending order, each with the size that fits there.
        let rest = u64::MAX;
        let places: &[(u64, u64)] = match self {
            Self::Firecracker => &[(0, 3 * GIB), (4 * GIB, 252 * GIB), (512 * GIB, rest)],
            Self::FirecrackerArm64 => &[(2 * GIB, 254 * GIB), (512 * GIB, rest)],
            Self::QemuPc if ram_size < 0xe000_0000 => &[(0, rest)],
            Self::QemuPc | Self::QemuMicrovm => &[(0, 3 * GIB), (4 * GIB, rest)],
            Self::QemuQ35 if ram_size < 0xb000_0000 => &[(0, rest)],
            Self::QemuQ35 => &[(0, 2 * GIB), (4 * GIB, rest)],
            Self::QemuVirt => &[(GIB, rest)],
        };
        let mut left = ram_size;
        RamLayout::new(places.iter().map_while(|(start, room)| {
            let size = left.min(*room);
            left -= size;
            (size > 0).then_some((*start, size))
        }))
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    const MIB: u64 = 1 << 20;

    #[rstest]
    #[case::firecracker_small(Machine::Firecracker, 128 * MIB, "0x0..0x8000000")]
    #[case::firecracker_up_to_the_gap(Machine::Firecracker, 3 * GIB, "0x0..0xc0000000")]
    #[case::firecracker_one_gap(
        Machine::Firecracker,
        6 * GIB,
        "0x0..0xc0000000, 0x100000000..0x1c0000000"
    )]
    #[case::firecracker_both_gaps(
        Machine::Firecracker,
        256 * GIB,
        "0x0..0xc0000000, 0x100000000..0x4000000000, 0x8000000000..0x8040000000"
    )]
    #[case::firecracker_arm64(
        Machine::FirecrackerArm64,
        255 * GIB,
        "0x80000000..0x4000000000, 0x8000000000..0x8040000000"
    )]
    #[case::pc_below_the_limit(Machine::QemuPc, 0xe000_0000 - MIB, "0x0..0xdff00000")]
    #[case::pc_at_the_limit(
        Machine::QemuPc,
        0xe000_0000,
        "0x0..0xc0000000, 0x100000000..0x120000000"
    )]
    #[case::q35_below_the_limit(Machine::QemuQ35, 0xb000_0000 - MIB, "0x0..0xaff00000")]
    #[case::q35_at_the_limit(
        Machine::QemuQ35,
        0xb000_0000,
        "0x0..0x80000000, 0x100000000..0x130000000"
    )]
    #[case::microvm(
        Machine::QemuMicrovm,
        3 * GIB + MIB,
        "0x0..0xc0000000, 0x100000000..0x100100000"
    )]
    #[case::virt(Machine::QemuVirt, 8 * GIB, "0x40000000..0x240000000")]
    fn ram_has_the_regions_of_its_machine(
        #[case] machine: Machine,
        #[case] ram_size: u64,
        #[case] expected: &str,
    ) {
        let layout = machine.layout(ram_size).unwrap();
        assert_eq!(layout.to_string(), expected);
        assert_eq!(layout.ram_size(), ram_size);
    }

    #[test]
    fn sizes_that_no_machine_has_are_refused() {
        for machine in Machine::ALL {
            assert_eq!(machine.layout(0), Err(LayoutError::NoRegion));
            machine.layout(5000).unwrap_err();
            machine.layout(u64::MAX - 4095).unwrap_err();
        }
    }

    #[rstest]
    #[case("pc-i440fx-9.2", Some(Machine::QemuPc))]
    #[case("pc-q35-7.2", Some(Machine::QemuQ35))]
    #[case("microvm", Some(Machine::QemuMicrovm))]
    #[case("virt-9.0", Some(Machine::QemuVirt))]
    // The machine of RISC-V, whose RAM begins elsewhere.
    #[case("virt", None)]
    #[case("pc-q35-", None)]
    fn machine_types_of_qemu_have_a_layout(#[case] name: &str, #[case] machine: Option<Machine>) {
        assert_eq!(Machine::of_qemu(name), machine);
    }
}
