//! A VMM with guest memory of `vm-memory` and memory slots of its own takes a full image and two
//! diffs of a guest, and continues the guest in a second virtual machine.
//!
//! `vmm.rs` is the VMM. Its lines that end in `// ramsnap` connect it to the crates: at most 24.
//!
//! `cargo run -p ramsnap-kvm-backend --example own_vmm`

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod vmm;

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
fn main() -> vmm::Result<()> {
    let kvm = kvm_backend::open_kvm()?;
    let dir = tempfile::tempdir()?;
    let images = ["full.mem", "d1.mem", "d2.mem"].map(|name| dir.path().join(name));
    let (mut guest, mut parent, mut stale) = (vmm::Vmm::new(&kvm)?, None, None);
    guest.boot()?;
    for path in &images {
        assert_eq!(guest.step()?, 1); // each step writes the next page
        let (id, pages) = guest.save(path, parent)?;
        println!("{}: {pages} pages", path.display());
        // The page of the step, and the program, which the VMM wrote before the full image.
        assert!(parent.is_none() || pages == 1, "{pages} pages in a diff");
        stale = std::mem::replace(&mut parent, id);
    }

    let mut copy = vmm::Vmm::new(&kvm)?;
    copy.restore(&images)?;
    assert!(copy.contents()? == guest.contents()?, "the RAM differs");
    let after = images[2].with_file_name("d3.mem");
    assert_eq!((copy.step()?, guest.step()?), (1, 1));
    assert!(copy.contents()? == guest.contents()?, "the guests differ");
    let refused = copy.save(&after, stale);
    assert!(refused.is_err(), "a diff from an older image than the RAM");
    let (_, pages) = copy.save(&after, parent)?;
    assert_eq!(pages, 1, "the first diff after a restore is not a full one");
    println!("the second virtual machine continues the guest, and its diff has {pages} page");
    Ok(())
}

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
fn main() {
    println!("this example needs KVM on x86-64");
}

#[cfg(all(test, target_os = "linux", target_arch = "x86_64"))]
mod tests {
    use test_machine::needs;

    #[test]
    fn own_vmm_is_saved_and_restored() {
        needs!(Kvm);
        super::main().unwrap();
    }

    #[test]
    fn at_most_24_lines_connect_the_vmm_to_the_crates() {
        let vmm = include_str!("vmm.rs");
        let added = vmm.lines().filter(|line| line.ends_with("// ramsnap"));
        assert!(added.count() <= 24);
        let code = vmm.lines().map(str::trim).filter(|line| {
            let other = ["//", "#!", "use "];
            !line.is_empty() && !other.iter().any(|start| line.starts_with(start))
        });
        assert!(code.count() <= 102);
    }
}
