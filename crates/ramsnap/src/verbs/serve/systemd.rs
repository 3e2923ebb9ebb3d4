//! What systemd passes to a service, and what a service reports.

use std::env;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener};

use crate::failure::Failure;
use crate::sys;

/// Returns the listening socket that was passed to this process, if one was (`LISTEN_FDS`).
pub fn socket() -> anyhow::Result<Option<UnixListener>> {
    let number = |name| {
        env::var(name)
            .ok()
            .and_then(|text| text.parse::<u32>().ok())
    };
    // The variables may be those of a parent.
    if number("LISTEN_PID") != Some(std::process::id()) {
        return Ok(None);
    }
    match number("LISTEN_FDS") {
        None | Some(0) => Ok(None),
        Some(1) => match sys::passed_listener() {
            Some(socket) => Ok(Some(socket.into())),
            None => Err(Failure::PassedSocket.into()),
        },
        Some(_) => Err(Failure::PassedSocket.into()),
    }
}

/// Reports a state to the service manager, if there is one (`NOTIFY_SOCKET`).
pub fn notify(state: &str) -> io::Result<()> {
    let Some(name) = env::var_os("NOTIFY_SOCKET") else {
        return Ok(());
    };
    let address = match name.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(&name)?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.send_to_addr(state.as_bytes(), &address).map(drop)
}
