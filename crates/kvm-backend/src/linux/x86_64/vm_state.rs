//! The state of a virtual machine's interrupt controllers, timer and clock.

use std::fmt;
use std::io;

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
    kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use zerocopy::IntoBytes;

use super::abi::{self, FormatVersion};

/// The chips of `KVM_CREATE_IRQCHIP`, in the order of their restoration.
const CHIPS: [u32; 3] = [
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
    KVM_IRQCHIP_IOAPIC,
];

/// The state of a virtual machine other than its RAM and vCPUs: the devices that KVM emulates
/// itself, and the guest's clock.
///
/// Like [`VcpuState`](crate::VcpuState) it has [bytes](Self::to_bytes), and is data for any serde
/// format.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
#[must_use = "the state is lost unless it is saved"]
pub struct VmState {
    format: FormatVersion<1>,
    /// Both PICs and the I/O APIC; empty if they are not in the kernel.
    pub irqchips: Vec<IrqChip>,
    /// The timer, if it is in the kernel.
    #[serde(with = "abi::option")]
    pub pit: Option<kvm_pit_state2>,
    /// The time of kvmclock in nanoseconds since the virtual machine was created, and the host time
    /// of the reading.
    #[serde(with = "abi")]
    pub clock: kvm_clock_data,
}

/// The state of one interrupt controller.
#[derive(Clone, Copy, Serialize, Deserialize)]
pub struct IrqChip(#[serde(with = "abi")] pub kvm_irqchip);

impl PartialEq for IrqChip {
    fn eq(&self, other: &Self) -> bool {
        self.0.as_bytes() == other.0.as_bytes()
    }
}

impl fmt::Debug for IrqChip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IrqChip")
            .field("chip_id", &self.0.chip_id)
            .field("bytes", &&self.0.as_bytes()[size_of::<u64>()..])
            .finish()
    }
}

impl VmState {
    /// Captures the state of `vm`, none of whose vCPUs may be running.
    ///
    /// # Errors
    /// Returns [`VmStateError::Kvm`].
    pub fn capture(vm: &VmFd) -> Result<Self, VmStateError> {
        let mut irqchips = Vec::new();
        for chip_id in CHIPS {
            let mut chip = kvm_irqchip {
                chip_id,
                ..kvm_irqchip::default()
            };
            if exists(vm.get_irqchip(&mut chip), "KVM_GET_IRQCHIP")?.is_some() {
                irqchips.push(IrqChip(chip));
            }
        }
        Ok(Self {
            format: FormatVersion,
            irqchips,
            pit: exists(vm.get_pit2(), "KVM_GET_PIT2")?,
            clock: vm.get_clock().map_err(failed("KVM_GET_CLOCK"))?,
        })
    }

    /// Restores this state into `vm`, after its vCPUs are restored and before they run: an
    /// interrupt that is pending in the I/O APIC is delivered to a local APIC at once.
    ///
    /// The clock continues from the captured time, as the time-stamp counter does.
    ///
    /// # Errors
    /// Returns a [`VmStateError`].
    pub fn restore(&self, vm: &VmFd) -> Result<(), VmStateError> {
        if let Some(pit) = &self.pit {
            exists(vm.set_pit2(pit), "KVM_SET_PIT2")?.ok_or(VmStateError::NoPit)?;
        }
        for IrqChip(chip) in &self.irqchips {
            exists(vm.set_irqchip(chip), "KVM_SET_IRQCHIP")?.ok_or(VmStateError::NoIrqChip)?;
        }
        // Without the flags, which describe the reading: KVM_CLOCK_REALTIME would add the time
        // since.
        let clock = kvm_clock_data {
            clock: self.clock.clock,
            ..kvm_clock_data::default()
        };
        vm.set_clock(&clock).map_err(failed("KVM_SET_CLOCK"))
    }
}

/// Returns `None` if KVM reports that the device was not created.
fn exists<T>(
    result: Result<T, kvm_ioctls::Error>,
    call: &'static str,
) -> Result<Option<T>, VmStateError> {
    /// The error of KVM for a device that was not created.
    const ENXIO: i32 = 6;
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.errno() == ENXIO => Ok(None),
        Err(error) => Err(failed(call)(error)),
    }
}

fn failed(call: &'static str) -> impl Fn(kvm_ioctls::Error) -> VmStateError {
    move |error| VmStateError::Kvm {
        call,
        source: error.into(),
    }
}

/// An error of capturing or restoring a virtual machine's state.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum VmStateError {
    /// A call of KVM failed.
    #[error(
        "{call} failed: the state of the virtual machine was not captured, or was restored in \
         part; restore into a new virtual machine: {source}"
    )]
    Kvm {
        /// The KVM call.
        call: &'static str,
        /// The error of KVM.
        #[source]
        source: io::Error,
    },
    /// The state has interrupt controllers, but the virtual machine has none.
    #[error(
        "the captured virtual machine had its interrupt controllers in the kernel: call \
         VmFd::create_irq_chip before creating vCPUs"
    )]
    NoIrqChip,
    /// The state has a timer, but the virtual machine has none.
    #[error(
        "the captured virtual machine had its timer in the kernel: call VmFd::create_pit2 before \
         restoring"
    )]
    NoPit,
}
