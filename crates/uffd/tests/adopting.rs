//! Descriptors that were opened elsewhere, for the memory of this process.

#![cfg(target_os = "linux")]
#![allow(unsafe_code)]

mod support;

use std::fs::File;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::libc;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};
use rstest::rstest;
use support::{Memory, in_thread, load, next_fault, page_of, register};
use test_machine::needs;
use uffd::{AdoptError, Features, FillFlags, Modes, Userfaultfd, UserfaultfdOptions};

const EVENTS: Features = Features::EVENT_REMAP.union(Features::EVENT_UNMAP);

fn device() -> OwnedFd {
    File::open("/dev/userfaultfd").unwrap().into()
}

/// A userfaultfd whose features were requested.
fn requested() -> OwnedFd {
    let options = Userfaultfd::options().features(EVENTS);
    options.open().unwrap().into()
}

/// A userfaultfd whose features were not requested yet.
fn new() -> OwnedFd {
    open(libc::O_CLOEXEC)
}

fn open(flags: libc::c_int) -> OwnedFd {
    // SAFETY: the call takes no address.
    let opened = Errno::result(unsafe { libc::syscall(libc::SYS_userfaultfd, flags) });
    // SAFETY: a new descriptor, which has no other owner.
    unsafe { OwnedFd::from_raw_fd(opened.unwrap() as i32) }
}

fn options() -> UserfaultfdOptions {
    Userfaultfd::options().features(EVENTS)
}

#[rstest]
#[case::device(device as fn() -> OwnedFd)]
#[case::new_userfaultfd(new)]
#[case::requested_features(requested)]
fn adopted_descriptor_receives_faults(#[case] open: fn() -> OwnedFd) {
    needs!(Root, Userfaultfd);
    let fault = options().adopt(open()).unwrap();
    assert_eq!(fault.features(), Some(EVENTS));
    assert!(fault.read_event().unwrap().is_none());
    let memory = Memory::private(1);
    register(&fault, memory.range(), Modes::MISSING);
    let address = memory.address(0);
    let reader = in_thread(move || load(address));
    next_fault(&fault);
    let filled = fault.copy_bytes(address, &page_of(5), FillFlags::empty());
    filled.complete().unwrap();
    assert_eq!(reader.join().unwrap(), 5);
    fault.unregister(memory.range()).unwrap();
}

#[test]
fn unavailable_optional_features_are_not_used() {
    needs!(Userfaultfd);
    let unknown = Features::from_bits_retain(1 << 63);
    let fault = options().optional_features(unknown).adopt(new()).unwrap();
    assert_eq!(fault.features(), Some(EVENTS));
}

#[rstest]
#[case::requested(requested as fn() -> OwnedFd, Features::THREAD_ID)]
#[case::new(new, Features::from_bits_retain(1 << 63))]
fn missing_features_are_named(#[case] open: fn() -> OwnedFd, #[case] lacks: Features) {
    needs!(Userfaultfd);
    let error = options()
        .features(EVENTS | lacks)
        .adopt(open())
        .unwrap_err();
    assert!(
        matches!(error, AdoptError::Features { missing } if missing.contains(lacks)),
        "{error:?}"
    );
}

#[test]
fn descriptors_of_other_kinds_are_refused() {
    needs!(Root, Userfaultfd);
    for path in ["/dev/null", "/proc/self/maps", "/dev/kvm"] {
        let Ok(file) = File::open(path) else { continue };
        let error = options().adopt(file.into()).unwrap_err();
        assert!(
            matches!(error, AdoptError::NotUserfaultfd),
            "{path}: {error:?}"
        );
    }
}

#[rstest]
#[case::missing(Modes::MISSING)]
#[case::write_protection(Modes::WRITE_PROTECT)]
fn a_userfaultfd_with_registered_memory_is_refused(#[case] modes: Modes) {
    needs!(Userfaultfd);
    let memory = Memory::private(1);
    // Dropped first: unmapping registered memory waits until the event is read.
    let fault = options().open().unwrap();
    register(&fault, memory.range(), modes);
    let duplicate = fault.as_fd().try_clone_to_owned().unwrap();
    let error = options().adopt(duplicate).unwrap_err();
    assert!(matches!(error, AdoptError::InUse(_)), "{error:?}");
    fault.unregister(memory.range()).unwrap();
    drop(options().adopt(fault.into()).unwrap());
}

/// Memory that is registered with another userfaultfd does not count.
#[test]
fn registrations_of_another_userfaultfd_are_kept() {
    needs!(Userfaultfd);
    let other = Userfaultfd::options().open().unwrap();
    let memory = Memory::private(1);
    register(&other, memory.range(), Modes::MISSING);
    let fault = options().adopt(requested()).unwrap();
    let address = memory.address(0);
    let reader = in_thread(move || load(address));
    next_fault(&other);
    let filled = other.copy_bytes(address, &page_of(5), FillFlags::empty());
    filled.complete().unwrap();
    assert_eq!(reader.join().unwrap(), 5);
    drop(fault);
}

#[test]
fn userfaultfd_for_user_mode_only_is_refused_unless_asked() {
    needs!(Userfaultfd);
    const USER_MODE_ONLY: libc::c_int = 1;
    let error = options().adopt(open(USER_MODE_ONLY)).unwrap_err();
    assert!(matches!(error, AdoptError::UserModeOnly), "{error:?}");
    let options = options().user_mode_only(true);
    drop(options.adopt(open(USER_MODE_ONLY)).unwrap());
}

/// The child has the descriptor, and its memory is a copy of that of the parent.
#[rstest]
#[case::new(new as fn() -> OwnedFd)]
#[case::requested(requested)]
fn userfaultfd_of_another_process_is_refused(#[case] open: fn() -> OwnedFd) {
    needs!(Userfaultfd);
    let fault = open();
    // SAFETY: the child uses memory and threads of its own only, and ends.
    match unsafe { fork() }.unwrap() {
        ForkResult::Child => {
            let adopted = options().adopt(fault);
            let refused = matches!(adopted, Err(AdoptError::OtherProcess));
            // SAFETY: ends the child at once.
            unsafe { libc::_exit(refused.into()) }
        }
        ForkResult::Parent { child } => {
            assert_eq!(waitpid(child, None), Ok(WaitStatus::Exited(child, 1)));
        }
    }
}
