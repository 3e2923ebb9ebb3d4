//! Takes live snapshots of a KVM guest, a full one and diffs, and continues the guest in a new
//! virtual machine.
//!
//! `cargo run -p embedding --example live_vmm`

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
#[path = "../../../crates/kvm-backend/examples/precopy/guest.rs"]
#[allow(dead_code, reason = "this tracker needs no dirty log")]
mod guest;

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
#[path = "live_vmm/live.rs"]
mod live;

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
#[path = "live_vmm/run.rs"]
mod run;

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
fn main() -> Result<(), guest::AnyError> {
    run::demo()
}

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
fn main() {
    println!("this example needs KVM on x86-64");
}
