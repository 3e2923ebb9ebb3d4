//! Capture of a vCPU's state.

use std::io;

use kvm_bindings::nested::KvmNestedStateBuffer;
use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, VcpuFd};
use thiserror::Error;
use zerocopy::IntoBytes;

use super::abi::FormatVersion;
use super::msrs::MsrList;
use super::vcpu_state::VcpuState;
use super::{msrs, xsave};
use crate::linux::machine::Machine;
use crate::linux::vcpus::{Paused, Vcpu};

impl VcpuState {
    /// Captures the state of `vcpu`. Every vCPU must be [paused](crate::Vcpus::pause): none runs
    /// (one can send another an interrupt), and none has an instruction that KVM has yet to
    /// complete. `msrs` are the model-specific registers to capture: those of the host's
    /// [`MsrList`].
    ///
    /// # Errors
    /// Returns [`CaptureError`], which names the call that failed.
    pub fn capture(msrs: &MsrList, paused: &Paused, vcpu: &Vcpu) -> Result<Self, CaptureError> {
        if !vcpu.is_of(paused) {
            return Err(CaptureError::NotPaused);
        }
        Self::capture_idle(msrs, paused.machine(), vcpu)
    }

    fn capture_idle(
        list: &MsrList,
        machine: &Machine,
        vcpu: &VcpuFd,
    ) -> Result<Self, CaptureError> {
        // The order matters. Reading mp_state first lets a pending INIT or SIPI take effect. The
        // events are last, since other calls may still add an interrupt (KVM_GET_LAPIC syncs posted
        // ones).
        let mp_state = vcpu.get_mp_state().map_err(failed("KVM_GET_MP_STATE"))?;
        let regs = vcpu.get_regs().map_err(failed("KVM_GET_REGS"))?;
        let sregs = vcpu.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
        let xsave2 = machine.check_extension(Cap::Xsave2);
        let xsave = xsave::read(xsave2, vcpu).map_err(failed("KVM_GET_XSAVE"))?;
        let xcrs = vcpu.get_xcrs().map_err(failed("KVM_GET_XCRS"))?;
        let debug_regs = vcpu.get_debug_regs().map_err(failed("KVM_GET_DEBUGREGS"))?;
        let lapic = match vcpu.get_lapic() {
            Ok(lapic) => Some(lapic),
            Err(error) if io::Error::from(error).kind() == io::ErrorKind::InvalidInput => None,
            Err(error) => return Err(failed("KVM_GET_LAPIC")(error)),
        };
        let (msrs, unreadable_msrs) =
            msrs::read(vcpu, list.indices()).map_err(failed("KVM_GET_MSRS"))?;
        let tsc_khz = if machine.check_extension(Cap::GetTscKhz) > 0 {
            Some(vcpu.get_tsc_khz().map_err(failed("KVM_GET_TSC_KHZ"))?)
        } else {
            None
        };
        let nested = nested(machine, vcpu)?;
        let cpuid = cpuid(vcpu)?;
        let events = vcpu
            .get_vcpu_events()
            .map_err(failed("KVM_GET_VCPU_EVENTS"))?;
        Ok(Self {
            format: FormatVersion,
            regs,
            sregs,
            debug_regs,
            xcrs,
            xsave,
            msrs,
            unreadable_msrs,
            events,
            mp_state,
            lapic,
            cpuid,
            tsc_khz,
            nested,
        })
    }
}

/// Returns the CPUID entries that were set. KVM fills the first entries of the array, and the
/// others stay zero.
fn cpuid(vcpu: &VcpuFd) -> Result<Vec<kvm_cpuid_entry2>, CaptureError> {
    let array = vcpu
        .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
        .map_err(failed("KVM_GET_CPUID2"))?;
    let mut entries = array.as_slice().to_vec();
    while entries
        .pop_if(|entry| *entry == kvm_cpuid_entry2::default())
        .is_some()
    {}
    Ok(entries)
}

fn nested(machine: &Machine, vcpu: &VcpuFd) -> Result<Option<Vec<u8>>, CaptureError> {
    if machine.check_extension(Cap::NestedState) <= 0 {
        return Ok(None);
    }
    let mut buffer = KvmNestedStateBuffer::empty();
    vcpu.nested_state(&mut buffer)
        .map_err(failed("KVM_GET_NESTED_STATE"))?;
    // The header counts even without data after it: it has the address of the VMXON region.
    Ok(Some(buffer.as_bytes()[..buffer.size as usize].to_vec()))
}

fn failed(call: &'static str) -> impl Fn(kvm_ioctls::Error) -> CaptureError {
    move |error| CaptureError::Refused {
        call,
        source: error.into(),
    }
}

/// An error of capturing a vCPU's state.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CaptureError {
    /// The vCPU is not one of the paused ones.
    #[error("the vCPU is not one of the paused ones: pause the Vcpus that created or adopted it")]
    NotPaused,
    /// A call of KVM failed.
    #[error("{call} failed: the state of this vCPU can't be captured completely: {source}")]
    Refused {
        /// The KVM call.
        call: &'static str,
        /// The error of KVM.
        #[source]
        source: io::Error,
    },
}
