//! The end of an instruction that left the guest for I/O.

use std::io;

use kvm_ioctls::{VcpuExit, VcpuFd};

/// Completes the instruction for which `vcpu` last left the guest, without running any other: to be called before its state is
/// captured.
///
/// KVM ends an `in`, an `out` or an access to MMIO only when the vCPU is run again. State captured before that
/// has the instruction pointer still on it: restored, the guest would do the same I/O a second time, or miss the
/// value that an `in` was answered with. Answer the exit first, as always; then this call.
///
/// One instruction may need several exits (`rep outsb`, MMIO across a page border): `handle` gets those that follow. It is not
/// called for an instruction of one exit, nor where nothing is pending.
///
/// # Errors
/// Whatever `KVM_RUN` says, other than the `EINTR` that ends this.
///
/// # Examples
/// ```no_run
/// # fn example(kvm: &kvm_ioctls::Kvm, vm: &kvm_ioctls::VmFd, vcpu: &mut kvm_ioctls::VcpuFd) -> Result<(), Box<dyn std::error::Error>> {
/// kvm_backend::complete_io(vcpu, |exit| panic!("this guest has no string I/O: {exit:?}"))?;
/// # #[cfg(target_arch = "x86_64")]
/// let state = kvm_backend::VcpuState::capture(kvm, vm, vcpu)?;
/// # Ok(())
/// # }
/// ```
pub fn complete_io(vcpu: &mut VcpuFd, mut handle: impl FnMut(VcpuExit<'_>)) -> io::Result<()> {
    vcpu.set_kvm_immediate_exit(1);
    let completed = loop {
        match vcpu.run().map_err(io::Error::from) {
            Ok(exit) => handle(exit),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => break Ok(()),
            Err(error) => break Err(error),
        }
    };
    vcpu.set_kvm_immediate_exit(0);
    completed
}
