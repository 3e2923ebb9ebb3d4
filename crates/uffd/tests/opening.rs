//! Opening a descriptor, features, and descriptors from elsewhere.

#![cfg(target_os = "linux")]
#![allow(unsafe_code)]

mod support;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::thread;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::libc;
use support::{Memory, in_thread, load, next_fault, page_of, register};
use test_machine::needs;
use uffd::{Features, FillFlags, Modes, OpenError, RegisterError, Userfaultfd};

/// A bit that no kernel uses so far.
const UNKNOWN: Features = Features::from_bits_retain(1 << 63);

/// Runs `work` in a thread that gives up its privileges by `drop_privileges`.
fn without_privilege<T: Send + 'static>(
    drop_privileges: fn(),
    work: impl FnOnce() -> T + Send + 'static,
) -> T {
    let thread = thread::spawn(move || {
        drop_privileges();
        work()
    });
    thread.join().unwrap()
}

fn become_another_user() {
    // SAFETY: the call takes no address and changes only this thread, because no libc wrapper
    // applies it to the others.
    let changed = unsafe { libc::syscall(libc::SYS_setresuid, 65534, 65534, 65534) };
    assert_eq!(changed, 0);
}

fn drop_capabilities() {
    // capset(2): version 3, this thread; two sets of effective, permitted and inheritable
    // capabilities, all empty.
    let (header, none) = ([0x2008_0522_u32, 0], [0_u32; 6]);
    // SAFETY: both have the layout of the kernel's structs and outlive the call, which changes only
    // this thread.
    let changed = unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), none.as_ptr()) };
    assert_eq!(changed, 0);
}

/// Returns whether every user may use userfaultfd here.
fn everyone_may() -> bool {
    let path = "/proc/sys/vm/unprivileged_userfaultfd";
    std::fs::read_to_string(path).is_ok_and(|value| value.trim() == "1")
}

#[test]
fn descriptors_do_not_block_and_close_on_exec() {
    needs!(Userfaultfd);
    let fault = Userfaultfd::options().open().unwrap();
    let status = fcntl(&fault, FcntlArg::F_GETFL).unwrap();
    assert!(OFlag::from_bits_retain(status).contains(OFlag::O_NONBLOCK));
    let flags = fcntl(&fault, FcntlArg::F_GETFD).unwrap();
    assert!(FdFlag::from_bits_retain(flags).contains(FdFlag::FD_CLOEXEC));
    assert_eq!(fault.features(), Some(Features::empty()));
}

#[test]
fn without_permission_the_error_names_the_remedies() {
    const TEST: &str = "without_permission_the_error_names_the_remedies";
    needs!(Root);
    if everyone_may() {
        test_machine::not_run(TEST, "every user may use userfaultfd");
        return;
    }
    let opened = without_privilege(become_another_user, || Userfaultfd::options().open());
    let error = opened.unwrap_err();
    let OpenError::NotPermitted { call, .. } = &error else {
        panic!("{error:?}");
    };
    assert_eq!(call.raw_os_error(), Some(Errno::EPERM as i32));
    let text = error.to_string();
    for remedy in [
        "/dev/userfaultfd",
        "CAP_SYS_PTRACE",
        "vm.unprivileged_userfaultfd",
    ] {
        assert!(text.contains(remedy), "{text}");
    }
}

#[test]
fn permission_for_the_device_suffices() {
    needs!(Root, Userfaultfd);
    let memory = Memory::private(1);
    let range = memory.range();
    let fault = without_privilege(drop_capabilities, || Userfaultfd::options().open()).unwrap();
    register(&fault, range, Modes::MISSING);
    let address = memory.address(0);
    let reader = in_thread(move || support::load_by_kernel(address));
    next_fault(&fault);
    let filled = fault.copy_bytes(address, &page_of(2), FillFlags::empty());
    filled.complete().unwrap();
    assert_eq!(reader.join().unwrap(), Ok(2));
}

#[test]
fn user_mode_faults_need_no_privilege() {
    needs!(Root, Userfaultfd);
    let memory = Memory::private(1);
    let open = || Userfaultfd::options().user_mode_only(true).open();
    let fault = without_privilege(become_another_user, open).unwrap();
    register(&fault, memory.range(), Modes::MISSING);
    let address = memory.address(0);
    assert_eq!(support::load_by_kernel(address), Err(Errno::EFAULT));
    let reader = in_thread(move || load(address));
    next_fault(&fault);
    let filled = fault.copy_bytes(address, &page_of(2), FillFlags::empty());
    filled.complete().unwrap();
    assert_eq!(reader.join().unwrap(), 2);
}

#[test]
fn required_features_must_exist_and_optional_ones_may() {
    needs!(Userfaultfd);
    let supported = Userfaultfd::options().supported().unwrap();
    assert!(supported.contains(Features::EVENT_REMAP), "{supported:?}");
    assert!(!supported.contains(UNKNOWN), "{supported:?}");

    let options = Userfaultfd::options().features(Features::EVENT_REMAP | UNKNOWN);
    let error = options.open().unwrap_err();
    assert!(
        matches!(&error, OpenError::Features { missing } if *missing == UNKNOWN),
        "{error:?}"
    );
    let options = Userfaultfd::options()
        .features(Features::EVENT_REMAP)
        .optional_features(Features::EVENT_UNMAP | UNKNOWN);
    let fault = options.open().unwrap();
    let used = Features::EVENT_REMAP | Features::EVENT_UNMAP;
    assert_eq!(fault.features(), Some(used));
}

#[test]
fn fork_events_need_a_capability() {
    needs!(Root, Userfaultfd);
    let required = || Userfaultfd::options().features(Features::EVENT_FORK).open();
    let error = without_privilege(drop_capabilities, required).unwrap_err();
    assert!(matches!(error, OpenError::ForkNotPermitted), "{error:?}");
    let optional = || {
        let options = Userfaultfd::options().features(Features::EVENT_REMAP);
        options
            .optional_features(Features::EVENT_FORK | UNKNOWN)
            .open()
    };
    let fault = without_privilege(drop_capabilities, optional).unwrap();
    assert_eq!(fault.features(), Some(Features::EVENT_REMAP));
}

#[test]
fn other_descriptors_are_refused() {
    needs!(Userfaultfd);
    let refuse = |descriptor: OwnedFd| {
        let error = Userfaultfd::from_fd(descriptor).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::InvalidInput);
        assert!(error.to_string().contains("not a userfaultfd"), "{error}");
    };
    refuse(File::open("/proc/self/maps").unwrap().into());
    refuse(File::open("/dev/null").unwrap().into());
    refuse(File::open("/dev/userfaultfd").unwrap().into());
    refuse(nix::unistd::pipe().unwrap().0);
}

/// A descriptor that another library opened: blocking, and with features that it requested.
#[test]
fn adopted_descriptors_are_made_non_blocking() {
    needs!(Userfaultfd);
    let opened = Userfaultfd::options().open().unwrap();
    fcntl(&opened, FcntlArg::F_SETFL(OFlag::O_RDONLY)).unwrap();
    let fault = Userfaultfd::from_fd(opened.into()).unwrap();
    assert_eq!(fault.features(), None);
    assert!(fault.read_event().unwrap().is_none());
    let memory = Memory::private(1);
    register(&fault, memory.range(), Modes::MISSING);
    let address = memory.address(0);
    let reader = in_thread(move || load(address));
    next_fault(&fault);
    fault
        .zeropage(memory.range(), FillFlags::empty())
        .complete()
        .unwrap();
    assert_eq!(reader.join().unwrap(), 0);
}

#[test]
fn duplicates_keep_the_registration() {
    needs!(Userfaultfd);
    let fault = Userfaultfd::options()
        .features(Features::THREAD_ID)
        .open()
        .unwrap();
    let memory = Memory::private(1);
    register(&fault, memory.range(), Modes::MISSING);
    let duplicate = fault.try_clone().unwrap();
    assert_eq!(duplicate.features(), fault.features());
    drop(fault);
    let address = memory.address(0);
    let reader = in_thread(move || load(address));
    next_fault(&duplicate);
    duplicate
        .zeropage(memory.range(), FillFlags::empty())
        .complete()
        .unwrap();
    assert_eq!(reader.join().unwrap(), 0);
}

#[test]
fn memory_has_at_most_one_userfaultfd() {
    needs!(Userfaultfd);
    let memory = Memory::private(1);
    let (first, second) = (
        Userfaultfd::options().open().unwrap(),
        Userfaultfd::options().open().unwrap(),
    );
    register(&first, memory.range(), Modes::MISSING);
    let refuse = |range: std::ops::Range<u64>, errno: Errno| {
        // SAFETY: the test's own mapping, or an address range that is refused.
        let error = unsafe { second.register(range.clone(), Modes::MISSING) }.unwrap_err();
        let RegisterError {
            range: refused,
            source,
            ..
        } = error;
        assert_eq!(refused, range);
        assert_eq!(source.raw_os_error(), Some(errno as i32));
    };
    refuse(memory.range(), Errno::EBUSY);
    refuse(memory.address(0)..memory.address(0) + 1, Errno::EINVAL);
    first.unregister(memory.range()).unwrap();
    register(&second, memory.range(), Modes::MISSING);
}
