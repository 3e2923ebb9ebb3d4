//! An NFS server that can be stopped and started, behind a proxy that can lose its answers.

use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::bail;

use super::proxy::Proxy;

/// The server on this machine's loopback. Only a guest made for it has one: stopping it stops every
/// export.
pub(crate) struct Server {
    /// Between client and server.
    pub proxy: Proxy,
}

/// Threads of the server.
const THREADS: &str = "4";

/// Starts the kernel's server threads.
pub(crate) fn start() -> anyhow::Result<()> {
    run("rpc.nfsd", &[THREADS])
}

/// Stops them: open connections end, what was not answered is not.
pub(crate) fn stop() -> anyhow::Result<()> {
    run("rpc.nfsd", &["0"])
}

/// Off and on again, with a pause that a client notices.
pub(crate) fn restart() -> anyhow::Result<()> {
    stop()?;
    thread::sleep(Duration::from_millis(500));
    start()
}

pub(crate) fn run(program: &str, arguments: &[&str]) -> anyhow::Result<()> {
    let output = Command::new(program).args(arguments).output()?;
    if !output.status.success() {
        bail!(
            "{program} {}: {}",
            arguments.join(" "),
            // What follows a program's first line is advice.
            String::from_utf8_lossy(&output.stderr)
                .lines()
                .next()
                .unwrap_or_default()
        );
    }
    Ok(())
}
