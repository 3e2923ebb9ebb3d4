//! Saves a running KVM guest by pre-copy from a program with tokio: with progress, and cancelled if
//! the future is dropped.
//!
//! `cargo run -p embedding --example precopy_tokio`

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
#[path = "../../../crates/kvm-backend/examples/precopy/guest.rs"]
mod guest;

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
#[path = "precopy_tokio/save.rs"]
mod save;

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
fn main() -> Result<(), guest::AnyError> {
    if let Err(error) = kvm_backend::open_kvm() {
        println!("not run: {error}");
        return Ok(());
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()?;
    runtime.block_on(save::demo())
}

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
fn main() {
    println!("this example needs KVM on x86-64");
}
