//! Lazily filled RAM by a descriptor from elsewhere, in a process that may not open one.
#![cfg(target_os = "linux")]

mod support;

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::sync::Arc;

use lazy_restore::uffd::{AdoptError, Features, Userfaultfd};
use lazy_restore::{LazyError, LazyRam, LazyRamOptions, SizedReader, UserfaultfdError};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use nix::unistd::{Gid, Uid, setresgid, setresuid};
use rstest::rstest;
use support::lazy_images::{PAGE, on_demand};
use support::regions::{Regions, page_at};
use test_machine::needs;

/// Set for the child that gives up its privileges.
const CHILD: &str = "RAMSNAP_TEST_UNPRIVILEGED";

const RAM: u64 = 16 * PAGE;

fn source() -> SizedReader<Vec<u8>> {
    SizedReader::new(vec![7; RAM as usize], RAM)
}

fn device() -> OwnedFd {
    let device = File::options()
        .read(true)
        .write(true)
        .open("/dev/userfaultfd");
    device.unwrap().into()
}

fn userfaultfd(features: Features) -> OwnedFd {
    let fault = Userfaultfd::options().features(features).open();
    fault.unwrap().into()
}

/// A userfaultfd with the features that filling needs.
fn usable() -> OwnedFd {
    userfaultfd(Features::EVENT_REMAP | Features::EVENT_REMOVE | Features::EVENT_UNMAP)
}

fn assert_fills(ram: &LazyRam) {
    let first = page_at(ram.as_ptr()).unwrap();
    assert!(first == [7; PAGE as usize]);
    ram.wait().unwrap();
}

#[track_caller]
fn refused(options: &LazyRamOptions) -> AdoptError {
    match options.start(source()).unwrap_err() {
        LazyError::Userfaultfd(UserfaultfdError::Passed(why)) => why,
        other => panic!("{other:?}"),
    }
}

/// Receives descriptors over the socket that is its standard input. Run by
/// `unprivileged_process_uses_a_device_it_received`.
#[test]
#[ignore = "run by another test"]
fn unprivileged_child() {
    if std::env::var_os(CHILD).is_none() {
        return;
    }
    let (user, group) = (Uid::from_raw(65534), Gid::from_raw(65534));
    setresgid(group, group, group).unwrap();
    setresuid(user, user, user).unwrap();
    let mut space = nix::cmsg_space!([i32; 2]);
    let mut byte = [0];
    let mut bytes = [IoSliceMut::new(&mut byte)];
    let message = recvmsg::<()>(0, &mut bytes, Some(&mut space), MsgFlags::empty());
    let passed = message.unwrap().cmsgs().unwrap().next().unwrap();
    let ControlMessageOwned::ScmRights(passed) = passed else {
        panic!("{passed:?}");
    };
    // SAFETY: the kernel has opened both for the receiver of the message.
    #[allow(unsafe_code)]
    let [device, of_the_parent] =
        [passed[0], passed[1]].map(|passed| unsafe { OwnedFd::from_raw_fd(passed) });

    let everyone_may = std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd");
    if everyone_may.is_ok_and(|value| value.trim() == "0") {
        let error = lazy_restore::available().unwrap_err();
        assert!(
            matches!(error, UserfaultfdError::NotPermitted(_)),
            "{error:?}"
        );
        for remedy in [
            "LazyRamOptions::userfaultfd",
            "CAP_SYS_PTRACE",
            "unprivileged_userfaultfd",
        ] {
            assert!(error.to_string().contains(remedy), "{error}");
        }
    }
    let options = on_demand().userfaultfd(of_the_parent);
    let why = refused(&options);
    assert!(matches!(why, AdoptError::OtherProcess), "{why:?}");

    // The device is for any number of guests.
    let options = on_demand().userfaultfd(device);
    let (first, second) = (options.start(source()), options.start(source()));
    assert_fills(&first.unwrap());
    assert_fills(&second.unwrap());
}

#[test]
fn unprivileged_process_uses_a_device_it_received() {
    needs!(Root, Userfaultfd);
    let (ours, theirs) = UnixStream::pair().unwrap();
    let passed = [device(), usable()];
    let numbers = [passed[0].as_raw_fd(), passed[1].as_raw_fd()];
    let message = [ControlMessage::ScmRights(&numbers)];
    let byte = [IoSlice::new(b"x")];
    sendmsg::<()>(ours.as_raw_fd(), &byte, &message, MsgFlags::empty(), None).unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--ignored", "--exact", "--nocapture", "unprivileged_child"]);
    child.env(CHILD, "1").stdin(OwnedFd::from(theirs));
    let output = child.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{:?}", output);
    assert!(text.contains("1 passed"), "{text}");
}

#[test]
fn privileged_process_finds_userfaultfd_available() {
    needs!(Userfaultfd);
    lazy_restore::available().unwrap();
}

#[rstest]
#[case::device(device as fn() -> OwnedFd)]
#[case::userfaultfd(usable)]
fn ram_is_filled_by_a_passed_descriptor(#[case] descriptor: fn() -> OwnedFd) {
    needs!(Root, Userfaultfd);
    let options = LazyRam::options().userfaultfd(descriptor());
    assert_fills(&options.start(source()).unwrap());
    // The first guest is gone.
    assert_fills(&options.start(source()).unwrap());
}

#[test]
fn userfaultfd_of_another_guest_is_refused() {
    needs!(Userfaultfd);
    let options = on_demand().userfaultfd(usable());
    let first = options.start(source()).unwrap();
    let why = refused(&options);
    assert!(matches!(why, AdoptError::InUse(_)), "{why:?}");
    assert_fills(&first);
}

#[test]
fn userfaultfd_without_needed_features_is_refused() {
    needs!(Userfaultfd);
    let has = Features::EVENT_REMAP | Features::EVENT_UNMAP;
    let why = refused(&on_demand().userfaultfd(userfaultfd(has)));
    assert!(
        matches!(why, AdoptError::Features { missing } if missing == Features::EVENT_REMOVE),
        "{why:?}"
    );
}

#[test]
fn other_descriptors_are_refused() {
    needs!(Userfaultfd);
    for path in ["/dev/null", "/proc/self/maps"] {
        let file = File::open(path).unwrap();
        let why = refused(&on_demand().userfaultfd(file.into()));
        assert!(matches!(why, AdoptError::NotUserfaultfd), "{why:?}");
    }
}

/// The kernel would let `munmap` wait for a handler that has ended: the duplicate keeps the
/// userfaultfd open.
#[rstest]
#[case::unfinished(false)]
#[case::finished(true)]
fn memory_is_unmapped_although_a_duplicate_is_open(#[case] finished: bool) {
    needs!(Userfaultfd);
    let passed = usable();
    let duplicate: BorrowedFd<'_> = std::os::fd::AsFd::as_fd(&passed);
    let duplicate = duplicate.try_clone_to_owned().unwrap();
    let options = Arc::new(on_demand().userfaultfd(passed));
    let ram = options.start(source()).unwrap();
    if finished {
        ram.wait().unwrap();
    }
    drop(ram); // unmaps its memory

    let regions = Regions::new(&[RAM]);
    // SAFETY: as in `Regions::adopt`.
    #[allow(unsafe_code)]
    let ram = unsafe { options.adopt(source(), regions.0.iter().copied()) }.unwrap();
    if finished {
        ram.wait().unwrap();
    }
    drop(ram);
    drop(regions); // unmaps them
    drop::<io::Result<OwnedFd>>(duplicate.try_clone());
}
