//! The VMs that are served, each in a thread, until a signal.

use std::collections::BTreeMap;
use std::io::{self, PipeReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, Scope};
use std::time::Duration;

use anyhow::Context;
use lazy_restore::{PageServer, ServedVm, VmEnd};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::Signalled;
use super::metrics::MetricsFile;
use super::socket::Socket;
use super::systemd;
use crate::exit_status::ExitStatus;
use crate::print;
use crate::session::Session;
use crate::stderr;

/// The interval at which metrics are written.
const METRICS_INTERVAL: u16 = 5_000;

/// The pause after a failure to accept a connection, such as for want of descriptors.
const RETRY: Duration = Duration::from_millis(200);

pub struct Vms<'s> {
    pub session: &'s Session,
    pub server: &'s PageServer,
    pub socket: &'s Socket,
    pub metrics: Option<MetricsFile>,
    /// The file that touched pages are written to.
    pub recorded: Option<&'s PathBuf>,
    pub on_signal: Signalled,
    /// The most VMs at the same time.
    pub most: usize,
    pub once: bool,
}

/// What the threads of VMs share.
#[derive(Debug, Default)]
struct Shared {
    /// The connections in progress: a VM, or `None` before it has sent its message.
    connections: Mutex<BTreeMap<u64, Option<Arc<ServedVm>>>>,
    /// Set once the VMs are to be filled completely.
    completing: AtomicBool,
    /// Set once a VM could not be served to its end.
    failed: AtomicBool,
}

impl Shared {
    fn connections(&self) -> MutexGuard<'_, BTreeMap<u64, Option<Arc<ServedVm>>>> {
        let locked = self.connections.lock();
        locked.unwrap_or_else(PoisonError::into_inner)
    }
}

impl Vms<'_> {
    /// Serves VMs until a signal ends this.
    pub fn serve(self, mut signals: PipeReader) -> anyhow::Result<ExitStatus> {
        let (mut ended, end) = io::pipe().context("cannot make a pipe")?;
        let shared = Shared::default();
        if let Err(error) = systemd::notify("READY=1") {
            self.session.warn(&format!(
                "cannot report readiness to NOTIFY_SOCKET: {error}"
            ));
        }
        thread::scope(|scope| self.accept_all(scope, &shared, &mut signals, &mut ended, &end))?;
        self.write_metrics(&shared);
        Ok(match self.once && shared.failed.into_inner() {
            true => ExitStatus::Failed,
            false => ExitStatus::Success,
        })
    }

    fn accept_all<'scope>(
        &'scope self,
        scope: &'scope Scope<'scope, '_>,
        shared: &'scope Shared,
        signals: &mut PipeReader,
        ended: &mut PipeReader,
        end: &'scope io::PipeWriter,
    ) -> anyhow::Result<()> {
        let (mut number, mut accepting) = (0, true);
        loop {
            let served = shared.connections().len();
            if !accepting && served == 0 {
                return Ok(());
            }
            let mut ready = vec![
                PollFd::new(signals.as_fd(), PollFlags::POLLIN),
                PollFd::new(ended.as_fd(), PollFlags::POLLIN),
            ];
            // Further VMs wait in the queue of the socket.
            if accepting && served < self.most {
                ready.push(PollFd::new(self.socket.as_fd(), PollFlags::POLLIN));
            }
            let limit = match self.metrics {
                Some(_) => PollTimeout::from(METRICS_INTERVAL),
                None => PollTimeout::NONE,
            };
            match poll(&mut ready, limit) {
                Err(Errno::EINTR) => continue,
                Ok(0) => self.write_metrics(shared),
                polled => _ = polled.context("cannot wait for connections")?,
            }
            let is_ready = |at: usize| ready.get(at).and_then(PollFd::any) == Some(true);
            let [signalled, ends, connects] = [0, 1, 2].map(is_ready);
            if ends {
                let _ = ended.read(&mut [0; 64]);
            }
            if signalled && self.signalled(scope, shared, signals) {
                accepting = false;
            }
            if connects && accepting {
                let accepted = self.accept(scope, shared, &mut number, end);
                accepting = !(accepted && self.once);
            }
            // A VM that has connected waits for its pages.
            if !accepting && self.socket.withdraw() {
                while self.accept(scope, shared, &mut number, end) {}
            }
        }
    }

    /// Accepts a connection and serves it in a thread. Returns whether there was one.
    fn accept<'scope>(
        &'scope self,
        scope: &'scope Scope<'scope, '_>,
        shared: &'scope Shared,
        numbers: &mut u64,
        end: &'scope io::PipeWriter,
    ) -> bool {
        let connection = match self.socket.accept() {
            Ok(None) => return false,
            Ok(Some(connection)) => connection,
            Err(error) => {
                let text = format!("cannot accept a connection: {error}");
                self.session.warn(&text);
                thread::sleep(RETRY);
                return false;
            }
        };
        *numbers += 1;
        let number = *numbers;
        shared.connections().insert(number, None);
        let serve = move || {
            self.serve_one(shared, number, connection);
            shared.connections().remove(&number);
            let _ = (&*end).write(&[0]);
        };
        let thread = thread::Builder::new().name("vm".to_owned());
        if let Err(error) = thread.spawn_scoped(scope, serve) {
            shared.connections().remove(&number);
            self.session
                .warn(&format!("cannot start a thread for a VM: {error}"));
        }
        true
    }

    /// Handles a signal. Returns whether ramsnap is to end.
    fn signalled<'scope>(
        &'scope self,
        scope: &'scope Scope<'scope, '_>,
        shared: &'scope Shared,
        signals: &mut PipeReader,
    ) -> bool {
        let _ = signals.read(&mut [0; 64]);
        let connections = shared.connections();
        let vms = print::count(connections.len() as u64, "VM");
        if connections.is_empty() {
            return true;
        }
        if self.on_signal == Signalled::Refuse {
            stderr::line(&format!(
                "{vms} still being served: end the VMs first, or start ramsnap with --on-signal \
                 complete"
            ));
            return false;
        }
        if shared.completing.swap(true, Ordering::Relaxed) {
            stderr::line(&format!(
                "{vms} still being filled: ramsnap ends when this is done"
            ));
            return true;
        }
        stderr::line(&format!(
            "no more VMs are accepted: ramsnap ends when all RAM of {vms} is filled"
        ));
        let _ = systemd::notify("STOPPING=1");
        for vm in connections.values().flatten() {
            let vm = Arc::clone(vm);
            let thread = thread::Builder::new().name("complete".to_owned());
            // Without a thread, the VM is filled as far as it touches its RAM.
            let _ = thread.spawn_scoped(scope, move || vm.complete());
        }
        true
    }

    /// Serves one VM to its end.
    fn serve_one(&self, shared: &Shared, number: u64, connection: UnixStream) {
        let vm = match self.server.serve(connection) {
            Ok(vm) => Arc::new(vm),
            Err(refused) => {
                shared.failed.store(true, Ordering::Relaxed);
                return self.session.warn(&refused.to_string());
            }
        };
        shared.connections().insert(number, Some(Arc::clone(&vm)));
        // A signal may have come before the VM was there.
        if shared.completing.load(Ordering::Relaxed) {
            vm.complete();
        }
        let process = vm.process().clone();
        let end = vm.wait();
        let faults = print::count(vm.faults(), "page fault");
        let said = match &end {
            VmEnd::Filled => format!("{process}: all RAM is filled, {faults}"),
            VmEnd::Failed(why) => {
                shared.failed.store(true, Ordering::Relaxed);
                let reaction = match vm.reaction() {
                    Some(reaction) => format!(" and was {reaction}"),
                    None => String::new(),
                };
                self.session.warn(&format!(
                    "{process} can no longer be served{reaction}: {why}"
                ));
                format!("{process}: no longer served, {faults}")
            }
            _ => format!("{process}: exited, {faults}"),
        };
        if let (VmEnd::Filled | VmEnd::Exited, Some(error)) = (&end, vm.error()) {
            self.session
                .warn(&format!("{process} has poisoned pages: {error}"));
        }
        // Stdout may be closed by now.
        let _ = self.session.say(&said);
        self.save_recorded(&vm);
    }

    fn save_recorded(&self, vm: &ServedVm) {
        let (Some(path), Some(set)) = (self.recorded, vm.recorded()) else {
            return;
        };
        if let Err(error) = set.save(path) {
            self.session
                .warn(&format!("the touched pages were not recorded: {error}"));
        }
    }

    fn write_metrics(&self, shared: &Shared) {
        let vms: Vec<_> = shared.connections().values().flatten().cloned().collect();
        if let Some(file) = &self.metrics
            && let Err(error) = file.write(&self.server.metrics(), &vms)
        {
            self.session
                .warn(&format!("cannot write the metrics: {error}"));
        }
    }
}
