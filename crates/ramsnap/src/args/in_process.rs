//! Arguments for RAM in the memory of a process.

#[cfg(target_os = "linux")]
use std::time::Duration;

use clap::Args;

#[cfg(target_os = "linux")]
use crate::numbers::duration;
#[cfg(target_os = "linux")]
use crate::process::{PATIENCE, ProcessRam, Region};
use crate::ram::Ram;
use crate::session::Session;

/// RAM in the memory of a process.
#[derive(Clone, Debug, Default, Args)]
pub struct InProcess {
    /// The id of the process that has mapped the RAM; ptrace stops it while its memory is read
    #[cfg(target_os = "linux")]
    #[arg(long)]
    pub pid: Option<u32>,
    /// The mapping of the RAM: its name or a part of it, an address in it, ADDRESS:SIZE, START-END,
    /// or `largest`; repeat the option for RAM in several mappings
    ///
    /// Addresses are hexadecimal, with 0x or as in /proc/PID/maps. The kernel joins adjacent
    /// mappings of memory without a file, so `largest` may be more than the RAM: a warning prints
    /// its ADDRESS:SIZE. The kernel splits a mapping when a part of it is treated differently, for
    /// example by a VMM that protects pages. ADDRESS is refused if the mappings beside it may be
    /// parts of the RAM.
    #[cfg(target_os = "linux")]
    #[arg(long, value_name = "NAME|ADDRESS|largest", requires = "pid", value_parser = Region::parse)]
    pub region: Vec<Region>,
    /// Wait so long for a process that cannot be stopped at once, in seconds or with a unit (5m)
    ///
    /// A thread that waits in the kernel, as for a child made by vfork or for a disk, stops only
    /// when it returns from there. The others run in the meantime. By default 10 seconds.
    #[cfg(target_os = "linux")]
    #[arg(long, value_name = "TIME", requires = "pid", conflicts_with = "live", value_parser = duration)]
    pub patience: Option<Duration>,
    /// Do not stop the process, because its guest is paused
    #[cfg(target_os = "linux")]
    #[arg(long, requires = "pid")]
    pub live: bool,
    /// Read memory whose file cannot be found: a `ramsnap restore` that writes to it is not noticed
    ///
    /// A file that the process has no descriptor of, and that has another name by now or none, is
    /// found only by root (CAP_CHECKPOINT_RESTORE). Memory without a file is always read.
    #[cfg(target_os = "linux")]
    #[arg(long, requires = "pid")]
    pub unknown_file: bool,
}

#[cfg(target_os = "linux")]
impl InProcess {
    pub fn is_given(&self) -> bool {
        self.pid.is_some()
    }

    /// Returns the session without what may block while a process is stopped, if one will be.
    pub fn session(&self, session: &Session) -> Session {
        match self.pid.is_some() && !self.live {
            true => session.without_bars(),
            false => session.clone(),
        }
    }

    /// Returns the RAM of the process, which runs until [`Ram::hold`].
    pub fn find(&self) -> anyhow::Result<Option<Ram>> {
        let patience = self.patience.unwrap_or(PATIENCE);
        let find = |pid| {
            let (live, unknown_file) = (self.live, self.unknown_file);
            ProcessRam::find(pid, &self.region, live, patience, unknown_file)
        };
        let ram = self.pid.map(find).transpose()?;
        Ok(ram.map(|ram| Ram::Process(Box::new(ram))))
    }
}

/// Reading the memory of a process is supported on Linux only.
#[cfg(not(target_os = "linux"))]
impl InProcess {
    pub fn is_given(&self) -> bool {
        false
    }

    pub fn session(&self, session: &Session) -> Session {
        session.clone()
    }

    pub fn find(&self) -> anyhow::Result<Option<Ram>> {
        Ok(None)
    }
}
