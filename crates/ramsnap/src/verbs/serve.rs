//! `ramsnap serve`: fills the RAM of VMs of other processes, by Firecracker's page-fault protocol.

mod counted;
mod metrics;
mod socket;
mod systemd;
mod vms;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use clap::{Args, ValueEnum};
use lazy_restore::{OnDamage, OnFailure, PageServer, PageServerOptions, WorkingSet};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::args::{Formats, FromDir, ImageFile, RawImages};
use crate::exit_status::ExitStatus;
use crate::failure::Failure;
use crate::input;
use crate::print::size;
use crate::session::Session;
use counted::Counted;
use metrics::MetricsFile;
use socket::Socket;
use vms::Vms;

/// Serve the RAM to VMMs that load a snapshot, page by page
///
/// A VMM connects to the socket and sends its memory regions and a userfaultfd, as Firecracker does
/// for `"mem_backend": {"backend_type": "Uffd", "backend_path": "SOCKET"}`. A page is filled when
/// the VMM or its guest touches it, and all other pages in the background. The images are read as
/// they are, and any number of VMs is served from them at the same time. Once all RAM of a VM is
/// filled, it no longer needs ramsnap.
///
/// A chunk of a sealed or packed image is compared with its checksum before a page of it is handed
/// out. A page that cannot be read, or of a damaged chunk, is never handed out.
///
/// ramsnap needs no permission for userfaultfd: it receives the descriptor. The VMM needs one:
/// access to /dev/userfaultfd (Linux 6.1), CAP_SYS_PTRACE, or the sysctl
/// vm.unprivileged_userfaultfd. To end a VMM that can no longer be served, ramsnap needs the same
/// user or CAP_KILL; without it, such a VMM is refused, unless --on-failure is notify.
///
/// Under systemd, the socket may come from a socket unit, and readiness is reported (Type=notify).
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    ramsnap serve --socket /run/vm/pages.sock full.mem d1.mem\n  \
    ramsnap serve --socket pages.sock --working-set full.set --record --once full.mem\n  \
    ramsnap serve --socket pages.sock --working-set full.set --prefetch full.mem")]
pub struct Serve {
    /// Images, oldest first
    #[arg(required = true, value_name = "FILE", value_parser = ImageFile::parser())]
    files: Vec<ImageFile>,
    #[command(flatten)]
    from: FromDir,
    #[command(flatten)]
    formats: Formats,
    /// The Unix socket to create, unless systemd has passed one. A socket that no process listens
    /// on is replaced
    #[arg(short, long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// The mode of the socket: who may connect
    #[arg(
        long,
        value_name = "OCTAL",
        default_value = "600",
        value_parser = octal,
        requires = "socket"
    )]
    socket_mode: u32,
    /// The pages that are filled first, or with --record the file to write them to
    #[arg(long, value_name = "FILE")]
    working_set: Option<PathBuf>,
    /// Write the pages that a VM has touched to the working set when it ends. Nothing is filled in
    /// the background
    #[arg(long, requires = "working_set")]
    record: bool,
    /// Fill the working set, and then all other pages, in the background; the default
    #[arg(long, conflicts_with_all = ["record", "no_prefetch"])]
    prefetch: bool,
    /// Fill only pages that are touched
    #[arg(long, conflicts_with = "record")]
    no_prefetch: bool,
    /// What happens to a VMM that can no longer be served
    #[arg(long, value_enum, default_value_t = Failing::Kill)]
    on_failure: Failing,
    /// What happens if pages cannot be read or are damaged
    #[arg(long, value_enum, default_value_t = Damaged::Poison)]
    on_damage: Damaged,
    /// What a signal that ends ramsnap does while VMs have missing pages
    #[arg(long, value_enum, default_value_t = Signalled::Complete)]
    on_signal: Signalled,
    /// How many faults of one VM are handled at the same time
    #[arg(
        long,
        value_name = "NUMBER",
        default_value_t = 4,
        value_parser = clap::value_parser!(u16).range(1..=64)
    )]
    handlers: u16,
    /// The most VMs that are served at the same time; further ones wait. The limit of descriptors
    /// is raised as far as permitted, and may permit fewer
    #[arg(
        long,
        value_name = "NUMBER",
        default_value_t = 256,
        value_parser = clap::value_parser!(u16).range(1..)
    )]
    max_vms: u16,
    /// How long to wait for the message of a VMM that has connected, in seconds
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = 30,
        value_parser = clap::value_parser!(u32).range(1..)
    )]
    message_timeout: u32,
    /// Accept no more VMs once one has connected, and end with it
    #[arg(long)]
    once: bool,
    /// How many KiB one fault reads at most: the pages around the touched one that are adjacent in
    /// the same image. Less than a page is taken as a page
    #[arg(
        long,
        value_name = "KIB",
        default_value_t = 16,
        value_parser = clap::value_parser!(u32).range(..=1 << 20)
    )]
    fault_around: u32,
    /// A file to write metrics to every 5 seconds, as Prometheus text
    #[arg(long, value_name = "FILE")]
    metrics: Option<PathBuf>,
    /// Do not compare the images with their checksums
    #[arg(long)]
    no_verify: bool,
    #[command(flatten)]
    raw: RawImages,
}

/// What happens to a VMM that can no longer be served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Failing {
    /// It is killed, also if it sent a userfaultfd with a message that is refused
    Kill,
    /// Its connection gets a line of JSON, and its missing pages are poisoned (SIGBUS)
    Notify,
}

/// What happens if pages cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Damaged {
    /// They are poisoned: an access gets SIGBUS. The others are filled
    Poison,
    /// The VMM can no longer be served: see --on-failure
    Fail,
}

/// What a signal does while VMs have missing pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Signalled {
    /// No more VMs are accepted, and ramsnap ends when all RAM of the others is filled
    Complete,
    /// It is refused with a message, and ramsnap goes on
    Refuse,
}

impl Serve {
    /// Finds the images that `--chain` stands for.
    pub fn find_chain(&mut self) -> anyhow::Result<()> {
        self.from.find(&mut self.files)
    }

    /// Returns the files that are read and written.
    pub fn files(&self) -> Vec<PathBuf> {
        let files = input::paths(&self.files).into_iter();
        let others = [&self.working_set, &self.metrics];
        files.chain(others.into_iter().flatten().cloned()).collect()
    }

    pub fn run(&self, session: &Session) -> anyhow::Result<ExitStatus> {
        let outputs = [self.metrics.as_ref(), self.recorded()];
        for path in outputs.into_iter().flatten() {
            if input::is_one_of(path, &input::paths(&self.files)) {
                let path = path.clone();
                return Err(Failure::OutputIsInput { path }.into());
            }
        }
        // Before images are opened, of which as many stay open as the limit permits.
        let most = raise_limit().min(self.max_vms.into());
        let chain = self.from.open(0, &self.files, |files| {
            input::full_chain(session, files, self.formats, &self.raw)
        })?;
        let options = self.options()?;
        let source = Counted::new(chain, !self.no_verify);
        let images = source.bytes();
        let server = options.source(source)?;
        // From now on, a signal must not leave the socket behind, or a VM without its pages.
        let signals = session.signals_as_bytes();
        let signals = signals.context("cannot receive signals")?;
        let socket = match &self.socket {
            Some(path) => Socket::create(path, self.socket_mode)?,
            None => Socket::passed()?,
        };
        let metrics = self.metrics.as_ref();
        let metrics = metrics.map(|path| MetricsFile::new(path, &socket.name(), images));
        if let Some(metrics) = &metrics {
            metrics.write_first(&server.metrics())?;
        }
        let ram = size(server.ram_size());
        session.say(&format!("{}: {ram} of RAM", socket.name()))?;
        let vms = Vms {
            session,
            server: &server,
            socket: &socket,
            metrics,
            recorded: self.recorded(),
            on_signal: self.on_signal,
            most,
            once: self.once,
        };
        vms.serve(signals)
    }

    /// Returns the file that the touched pages are written to.
    fn recorded(&self) -> Option<&PathBuf> {
        self.working_set.as_ref().filter(|_| self.record)
    }

    fn options(&self) -> anyhow::Result<PageServerOptions> {
        let mut options = PageServer::options()
            .prefetch(!self.no_prefetch)
            .record(self.record)
            .handlers(self.handlers.into())
            .fault_around(u64::from(self.fault_around) << 10)
            .handshake_limit(Duration::from_secs(self.message_timeout.into()))
            .on_failure(match self.on_failure {
                Failing::Kill => OnFailure::Kill,
                Failing::Notify => OnFailure::Notify,
            })
            .on_damage(match self.on_damage {
                Damaged::Poison => OnDamage::Poison,
                Damaged::Fail => OnDamage::Fail,
            });
        if let Some(path) = self.working_set.as_ref().filter(|_| !self.record) {
            options = options.working_set(WorkingSet::load(path)?);
        }
        Ok(options)
    }
}

/// Descriptors of a VM: its connection, its userfaultfd, its process, and what its threads are
/// woken by, some of them twice for a moment.
const DESCRIPTORS: u64 = 10;

/// Raises the limit of descriptors as far as permitted, and returns the number of VMs that half of
/// it is enough for.
fn raise_limit() -> usize {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else {
        return 1;
    };
    let raised = setrlimit(Resource::RLIMIT_NOFILE, hard, hard).map_or(soft, |()| hard);
    usize::try_from(raised / 2 / DESCRIPTORS).map_or(usize::MAX, |vms| vms.max(1))
}

/// Parses the mode of a file.
fn octal(text: &str) -> Result<u32, String> {
    let mode = u32::from_str_radix(text, 8).map_err(|error| error.to_string())?;
    match mode {
        0..=0o777 => Ok(mode),
        _ => Err("give a mode such as 660".to_owned()),
    }
}
