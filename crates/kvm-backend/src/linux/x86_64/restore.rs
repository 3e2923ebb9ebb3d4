//! Restoration of a vCPU's state.

use std::io;

use kvm_bindings::nested::KvmNestedStateBuffer;
use kvm_bindings::{CpuId, kvm_lapic_state};
use kvm_ioctls::{Cap, VcpuFd, VmFd};
use thiserror::Error;
use zerocopy::{FromBytes, IntoBytes};

use super::msrs::{self, IA32_TSC, IA32_TSC_DEADLINE};
use super::vcpu_state::{Msr, VcpuState};
use super::xsave;

/// The tolerance between two rates of the time-stamp counter that count as equal, in parts per
/// million: KVM's own default (`tsc_tolerance_ppm`, Linux arch/x86/kvm/x86.c). Calibration at boot
/// gives slightly different rates on the same machine.
const TSC_TOLERANCE_PPM: u64 = 250;

/// The local APIC's timer register: byte offset, mask bit, mode bits, and the mode TSC-deadline
/// (Intel SDM vol. 3A, 11.5.1 and 11.5.4.1).
const LVT_TIMER: usize = 0x320;
const LVT_MASKED: u32 = 1 << 16;
const LVT_MODE: u32 = 0b11 << 17;
const LVT_TSC_DEADLINE: u32 = 0b10 << 17;

/// The differences between a restored vCPU and the captured one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[must_use = "an MSR that differs may be one that the guest relies on"]
#[non_exhaustive]
pub struct Restored {
    /// The MSRs whose values differ from the captured ones, with the captured values. KVM refused
    /// them, or accepted and ignored them (for example the time-stamp counter, if KVM runs under
    /// another hypervisor that does not shift it).
    ///
    /// The time-stamp counter is listed if it is off by more than two seconds. An expired deadline
    /// is not listed.
    pub differing_msrs: Vec<Msr>,
    /// Whether the TSC-deadline timer was unmasked without a deadline, and is set to fire at once.
    ///
    /// KVM clears the deadline when it expires, and does not report the interrupt until it has
    /// delivered it. A timer captured in between would never fire again, and the guest would hang.
    /// An additional tick is harmless to a guest.
    pub timer_rearmed: bool,
}

impl VcpuState {
    /// Restores this state into `vcpu`, a vCPU of `vm` that has never run.
    ///
    /// Restore the guest's RAM first: KVM reads page-directory pointers from it, and writes a
    /// paravirtual clock into it. Restore [`VmState`](crate::VmState) after all vCPUs.
    ///
    /// The time-stamp counter continues from the captured value, without the time in between.
    /// Restore all vCPUs of a guest within a second, so that KVM synchronizes their counters.
    ///
    /// # Errors
    /// Returns a [`RestoreError`]. The vCPU is unusable then: restore into a new one.
    pub fn restore(&self, vm: &VmFd, vcpu: &VcpuFd) -> Result<Restored, RestoreError> {
        // The order matters. The counter's rate is first, since KVM uses it to convert a counter's
        // value into an offset.
        self.restore_tsc_rate(vcpu)?;
        // CPUID determines what KVM accepts from here on (CR4, XCR0, MSRs).
        let cpuid = CpuId::from_entries(&self.cpuid).map_err(|_| RestoreError::TooManyCpuids {
            entries: self.cpuid.len(),
        })?;
        vcpu.set_cpuid2(&cpuid).map_err(failed("KVM_SET_CPUID2"))?;
        // These include the APIC base, which determines how the local APIC's registers are
        // interpreted.
        vcpu.set_sregs(&self.sregs)
            .map_err(failed("KVM_SET_SREGS"))?;
        vcpu.set_xcrs(&self.xcrs).map_err(failed("KVM_SET_XCRS"))?;
        let xsave2 = vm.check_extension_int(Cap::Xsave2);
        xsave::write(xsave2, vcpu, &self.xsave).map_err(failed("KVM_SET_XSAVE"))?;
        // This drops pending exceptions, so it precedes the events.
        vcpu.set_regs(&self.regs).map_err(failed("KVM_SET_REGS"))?;
        vcpu.set_debug_regs(&self.debug_regs)
            .map_err(failed("KVM_SET_DEBUGREGS"))?;
        self.restore_lapic(vcpu)?;
        let (msrs, timer_rearmed) = self.msrs_in_order();
        msrs::write(vcpu, &msrs).map_err(failed("KVM_SET_MSRS"))?;
        let differing_msrs = differing(vcpu, &msrs)?;
        vcpu.set_vcpu_events(&self.events)
            .map_err(failed("KVM_SET_VCPU_EVENTS"))?;
        // After the special registers, which make a vCPU at its reset vector runnable.
        vcpu.set_mp_state(self.mp_state)
            .map_err(failed("KVM_SET_MP_STATE"))?;
        // Last: this may enter the nested guest.
        self.restore_nested(vm, vcpu)?;
        Ok(Restored {
            differing_msrs,
            timer_rearmed,
        })
    }

    fn restore_tsc_rate(&self, vcpu: &VcpuFd) -> Result<(), RestoreError> {
        let Some(captured) = self.tsc_khz else {
            return Ok(());
        };
        let here = vcpu.get_tsc_khz().map_err(failed("KVM_GET_TSC_KHZ"))?;
        if u64::from(here.abs_diff(captured)) * 1_000_000 <= u64::from(captured) * TSC_TOLERANCE_PPM
        {
            return Ok(());
        }
        vcpu.set_tsc_khz(captured)
            .map_err(|error| RestoreError::TscRate {
                captured,
                here,
                source: error.into(),
            })
    }

    fn restore_lapic(&self, vcpu: &VcpuFd) -> Result<(), RestoreError> {
        let in_kernel = vcpu.get_lapic().is_ok();
        match &self.lapic {
            Some(_) if !in_kernel => Err(RestoreError::NoLapic),
            None if in_kernel => Err(RestoreError::LapicNotCaptured),
            Some(lapic) => vcpu.set_lapic(lapic).map_err(failed("KVM_SET_LAPIC")),
            None => Ok(()),
        }
    }

    /// Returns the MSRs with the timer's deadline last, since it needs the counter and a local APIC
    /// in TSC-deadline mode; and whether a lost deadline was replaced by the captured time.
    fn msrs_in_order(&self) -> (Vec<Msr>, bool) {
        let (mut msrs, mut deadlines): (Vec<Msr>, Vec<Msr>) = self
            .msrs
            .iter()
            .partition(|msr| msr.index != IA32_TSC_DEADLINE);
        let now = msrs.iter().find(|msr| msr.index == IA32_TSC);
        let lost = self.lapic.as_ref().is_some_and(waits_for_deadline)
            && deadlines.iter().all(|deadline| deadline.value == 0);
        let mut rearmed = false;
        if let (true, Some(now)) = (lost, now) {
            for deadline in &mut deadlines {
                deadline.value = now.value;
                rearmed = true;
            }
        }
        msrs.append(&mut deadlines);
        (msrs, rearmed)
    }

    fn restore_nested(&self, vm: &VmFd, vcpu: &VcpuFd) -> Result<(), RestoreError> {
        let Some(state) = &self.nested else {
            return Ok(());
        };
        let mut bytes = [0; size_of::<KvmNestedStateBuffer>()];
        let fits = bytes.get_mut(..state.len()).ok_or(RestoreError::Nested)?;
        fits.copy_from_slice(state);
        let buffer = KvmNestedStateBuffer::read_from_bytes(bytes.as_bytes())
            .map_err(|_| RestoreError::Nested)?;
        if vm.check_extension(Cap::NestedState) {
            vcpu.set_nested_state(&buffer)
                .map_err(failed("KVM_SET_NESTED_STATE"))
        } else {
            Err(RestoreError::Nested)
        }
    }
}

/// Returns those of `wanted` whose values in `vcpu` differ.
fn differing(vcpu: &VcpuFd, wanted: &[Msr]) -> Result<Vec<Msr>, RestoreError> {
    let indices: Vec<_> = wanted.iter().map(|msr| msr.index).collect();
    let (present, _) = msrs::read(vcpu, &indices).map_err(failed("KVM_GET_MSRS"))?;
    let tsc_khz = vcpu.get_tsc_khz().map_or(u64::MAX, u64::from);
    let as_wanted = |wanted: &Msr, present: &Msr| match wanted.index {
        // The counter runs, and KVM treats writes within a second as equal, to synchronize vCPUs.
        IA32_TSC => present.value.abs_diff(wanted.value) / 2000 <= tsc_khz,
        IA32_TSC_DEADLINE if present.value == 0 => true,
        _ => present.value == wanted.value,
    };
    let mut differing = wanted.to_vec();
    differing.retain(|wanted| {
        let mut present = present.iter().filter(|msr| msr.index == wanted.index);
        !present.any(|present| as_wanted(wanted, present))
    });
    Ok(differing)
}

/// Returns whether the timer is in TSC-deadline mode and unmasked.
fn waits_for_deadline(lapic: &kvm_lapic_state) -> bool {
    let timer = u32::read_from_bytes(&lapic.regs.as_bytes()[LVT_TIMER..LVT_TIMER + 4]);
    timer.is_ok_and(|timer| timer & (LVT_MODE | LVT_MASKED) == LVT_TSC_DEADLINE)
}

fn failed(call: &'static str) -> impl Fn(kvm_ioctls::Error) -> RestoreError {
    move |error| RestoreError::Kvm {
        call,
        source: error.into(),
    }
}

/// An error of restoring a vCPU's state. The vCPU has a part of it, and is unusable.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RestoreError {
    /// A call of KVM failed.
    #[error(
        "{call} failed: the vCPU must never have run, and this host's processor and KVM must have \
         every feature that the captured CPUID offers: {source}"
    )]
    Kvm {
        /// The KVM call.
        call: &'static str,
        /// The error of KVM.
        #[source]
        source: io::Error,
    },
    /// The captured time-stamp counter runs at a rate that this host can't provide.
    #[error(
        "the captured time-stamp counter runs at {captured} kHz, this host's at {here} kHz, and \
         its processor can't scale it: restore on a host with the same rate: {source}"
    )]
    TscRate {
        /// The captured rate in kHz.
        captured: u32,
        /// This host's rate in kHz.
        here: u32,
        /// The error of KVM.
        #[source]
        source: io::Error,
    },
    /// The state has more CPUID entries than KVM accepts.
    #[error(
        "the state has {entries} CPUID entries, more than KVM accepts: it was not captured from a \
         vCPU"
    )]
    TooManyCpuids {
        /// The number of entries.
        entries: usize,
    },
    /// The state has a local APIC, but the virtual machine has none in the kernel.
    #[error(
        "the captured vCPU had its local APIC in the kernel: create the interrupt controller \
         (VmFd::create_irq_chip, or a split one) before the vCPU"
    )]
    NoLapic,
    /// The virtual machine has its local APICs in the kernel, but the state has none.
    #[error(
        "the captured vCPU had no local APIC in the kernel: restore into a virtual machine \
         without an interrupt controller in the kernel"
    )]
    LapicNotCaptured,
    /// The state has that of a nested hypervisor, which this KVM does not accept.
    #[error(
        "the captured vCPU could run nested guests, but this KVM can't: load its module with \
         `nested=1`, or restore on a host with nesting"
    )]
    Nested,
}

#[cfg(all(test, not(ramsnap_loom)))]
mod tests {
    use super::*;

    #[test]
    fn deadline_is_written_after_the_counter() {
        let state = include_bytes!("../../../tests/golden/vcpu-state-1.postcard");
        let mut state: VcpuState = postcard::from_bytes(state).unwrap();
        let deadline = Msr {
            index: IA32_TSC_DEADLINE,
            value: 1,
        };
        state.msrs.retain(|msr| msr.index != deadline.index);
        state.msrs.insert(0, deadline);
        let (ordered, rearmed) = state.msrs_in_order();
        assert_eq!(ordered.last(), Some(&deadline));
        assert_eq!(ordered.len(), state.msrs.len());
        assert!(!rearmed);
    }
}
