//! The shortest handler of page faults, to compare the speed of others with.

#![allow(unsafe_code)]

use std::fs::File;
use std::io::IoSliceMut;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;

use nix::cmsg_space;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, UnixAddr, recvmsg};
use uffd::{Event, FillFlags, Userfaultfd};

/// Serves one client with one region from a file: each fault is one `pread` and one `UFFDIO_COPY`
/// of a page. It checks nothing. Ends with the connection.
pub fn serve_bare(listener: &UnixListener, file: &File) {
    let (connection, _) = listener.accept().unwrap();
    let mut bytes = [0; 4096];
    let mut slices = [IoSliceMut::new(&mut bytes)];
    let mut space = cmsg_space!([RawFd; 1]);
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let socket = connection.as_raw_fd();
    let received = recvmsg::<UnixAddr>(socket, &mut slices, Some(&mut space), flags).unwrap();
    let descriptor = received.cmsgs().unwrap().find_map(|message| match message {
        ControlMessageOwned::ScmRights(numbers) => {
            // SAFETY: the kernel has just opened the descriptor for this process.
            Some(unsafe { OwnedFd::from_raw_fd(numbers[0]) })
        }
        _ => None,
    });
    let len = received.bytes;
    let fault = Userfaultfd::from_fd(descriptor.unwrap()).unwrap();
    let regions: serde_json::Value = serde_json::from_slice(&bytes[..len]).unwrap();
    let start = regions[0]["base_host_virt_addr"].as_u64().unwrap();
    let mut page = [0; 4096];
    loop {
        let mut ready = [
            PollFd::new(fault.as_fd(), PollFlags::POLLIN),
            PollFd::new(connection.as_fd(), PollFlags::POLLIN),
        ];
        poll(&mut ready, PollTimeout::NONE).unwrap();
        while let Ok(Some(Event::PageFault { address, .. })) = fault.read_event() {
            file.read_exact_at(&mut page, address - start).unwrap();
            let filled = fault.copy_bytes(address, &page, FillFlags::empty());
            filled.complete().unwrap();
        }
        if ready[1].any() == Some(true) {
            return;
        }
    }
}
