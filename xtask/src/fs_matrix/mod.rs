//! `cargo xtask fs-matrix`: what holds on which file system, found out on real mounts.

mod checks;
mod child;
mod finding;
#[cfg(target_os = "linux")]
mod guest;
mod inside;
mod kind;
mod mounts;
#[cfg(target_os = "linux")]
mod nfs;
#[cfg(target_os = "linux")]
mod power;
mod process;
#[cfg(target_os = "linux")]
mod proxy;
mod ram;
mod report;
mod site;
mod subject;
mod trace;

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use xshell::Shell;

use crate::packages::Install;
use child::Child;
use finding::{Finding, Line, Verdict};
use inside::Inside;
use kind::{Kind, Place};
use mounts::Mount;
use process::{Interrupt, Process};
use report::{MountReport, Report};
use subject::Sabotage;

/// Mount each file system for real, run the library on it, and say what holds
///
/// On Linux, as root: ext4, XFS, btrfs and tmpfs by this machine's kernel; APFS, HFS+, exFAT, NFS v3 and NFS v4.2 by Debian's kernel in
/// QEMU. On macOS: APFS, HFS+, exFAT in disk images, and NFS v3. Exit code 0 says that no promise of the library is broken
/// anywhere.
#[derive(clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct FsMatrix {
    /// Only these mounts, comma-separated
    #[arg(long, value_enum, value_delimiter = ',', value_name = "MOUNT")]
    only: Vec<Kind>,
    /// List the mounts and the checks, and do nothing
    #[arg(long)]
    list: bool,
    /// Keep the disk images and logs under target/fs-matrix/run
    #[arg(long)]
    keep: bool,
    /// Write all findings to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write the tables to this file
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
    /// Check a directory that is mounted already, under this label; again for more. Only these, unless --only names others
    #[arg(long = "mount", value_name = "LABEL=PATH", value_parser = labelled)]
    mounts: Vec<(String, PathBuf)>,
    /// Only the checks of these names
    #[arg(long, value_name = "NAME")]
    check: Vec<String>,
    #[command(flatten)]
    install: Install,
    /// How often the power is lost (Linux); 0 for not at all
    #[arg(long, default_value_t = 20)]
    cuts: u32,
    /// Check a deliberately broken library instead: shows that the checks can fail
    #[arg(long, value_enum, hide = true)]
    sabotage: Option<Sabotage>,
    #[command(subcommand)]
    part: Option<Part>,
}

/// What this program does as a child of itself.
#[derive(clap::Subcommand)]
enum Part {
    #[command(hide = true)]
    Inside(Inside),
    #[command(hide = true)]
    Child(Child),
    #[cfg(target_os = "linux")]
    #[command(hide = true)]
    Guest(guest::inside::Guest),
    #[cfg(target_os = "linux")]
    #[command(hide = true)]
    Power(power::inside::Power),
}

fn labelled(text: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((label, path)) if !label.is_empty() && !path.is_empty() => {
            Ok((label.into(), path.into()))
        }
        _ => Err("write LABEL=PATH".into()),
    }
}

/// One mount to check.
enum Job {
    Here(Kind),
    User(String, PathBuf),
    #[cfg(target_os = "linux")]
    PowerLoss(Vec<Kind>),
}

impl Job {
    fn label(&self) -> String {
        match self {
            Self::Here(kind) => kind.to_string(),
            Self::User(label, _) => label.clone(),
            #[cfg(target_os = "linux")]
            Self::PowerLoss(_) => "power".into(),
        }
    }
}

/// The longest that one check may take, and mounting before the first.
const PATIENCE: Duration = Duration::from_secs(240);

impl FsMatrix {
    pub fn run(self, sh: &Shell) -> anyhow::Result<()> {
        match self.part {
            Some(Part::Inside(inside)) => return inside.run(),
            Some(Part::Child(child)) => return child.run(),
            #[cfg(target_os = "linux")]
            Some(Part::Guest(guest)) => return guest.run(),
            #[cfg(target_os = "linux")]
            Some(Part::Power(power)) => return power.run(),
            None => {}
        }
        if self.list {
            list();
            return Ok(());
        }
        let start = Instant::now();
        let interrupt = Interrupt::catch()?;
        let jobs = self.jobs()?;
        let here = |job: &Job| matches!(job, Job::Here(kind) if kind.place() == Place::Here);
        if jobs.iter().any(here) {
            self.install.ensure(sh, mounts::PACKAGES, "fs-matrix")?;
        }
        let run = Run {
            #[cfg(target_os = "linux")]
            kit: self.kit(sh, &jobs)?,
            options: &self,
            interrupt,
            progress: Progress::new(),
            after_power_loss: Mutex::default(),
        };
        let mounts = run.all(jobs)?;
        let report = Report {
            mounts,
            seconds: start.elapsed().as_secs(),
        };
        self.conclude(&report)
    }

    fn jobs(&self) -> anyhow::Result<Vec<Job>> {
        let kinds: Vec<Kind> = match (self.only.as_slice(), self.mounts.as_slice()) {
            ([], []) => Kind::here().collect(),
            (only, _) => only.to_vec(),
        };
        if let Some(kind) = kinds.iter().find(|kind| kind.place() == Place::Nowhere) {
            bail!("{kind} can't be mounted on this system");
        }
        if !kinds.is_empty() && !nix::unistd::geteuid().is_root() {
            bail!("mounting takes root: run as root, or check your own directories with --mount");
        }
        let users = self.mounts.iter().cloned();
        let mut jobs = Vec::new();
        #[cfg(target_os = "linux")]
        jobs.extend(self.power_loss(&kinds));
        jobs.extend(kinds.into_iter().map(Job::Here));
        jobs.extend(users.map(|(label, path)| Job::User(label, path)));
        Ok(jobs)
    }

    /// The longest job, so the first to begin.
    #[cfg(target_os = "linux")]
    fn power_loss(&self, kinds: &[Kind]) -> Option<Job> {
        let wanted = self.check.is_empty() || self.check.iter().any(|name| name == power::CHECK);
        let kinds: Vec<_> = kinds
            .iter()
            .copied()
            .filter(|kind| power::applies(*kind))
            .collect();
        (wanted && self.cuts > 0 && !kinds.is_empty()).then_some(Job::PowerLoss(kinds))
    }

    /// What guests are made of, where a job needs one.
    #[cfg(target_os = "linux")]
    fn kit(&self, sh: &Shell, jobs: &[Job]) -> anyhow::Result<Option<guest::Kit>> {
        let in_guest = |job: &Job| match job {
            Job::Here(kind) => kind.place() == Place::Guest,
            Job::PowerLoss(_) => true,
            Job::User(..) => false,
        };
        if !jobs.iter().any(in_guest) {
            return Ok(None);
        }
        let missing = self.install.ensure(sh, guest::PACKAGES, "fs-matrix")?;
        if let Some(package) = missing.first() {
            bail!(
                "guests need {}, which is in the package {}",
                package.shows,
                package.name
            );
        }
        let dir = sh.current_dir().join("target/fs-matrix");
        let say = |what: &str| eprintln!("{what}");
        guest::Kit::prepare(sh, &dir, self.install.allowed(), &say).map(Some)
    }

    /// Prints and saves, and fails where something is broken or was not checked.
    fn conclude(&self, report: &Report) -> anyhow::Result<()> {
        print!("{}", report.text());
        println!("\n{} mounts in {} s", report.mounts.len(), report.seconds);
        if let Some(path) = &self.json {
            report.save_json(path)?;
        }
        if let Some(path) = &self.markdown {
            report.save_markdown(path)?;
        }
        let unfinished = report.failed().count();
        match report.broken() {
            0 if unfinished == 0 => Ok(()),
            broken => bail!("{broken} broken, {unfinished} mounts not checked to the end"),
        }
    }
}

fn list() {
    println!("mounts:");
    for kind in Kind::here() {
        let place = match kind.place() {
            Place::Guest => "by Debian's kernel in QEMU",
            _ => "by this machine's kernel",
        };
        println!("  {:10} {kind}, {place}", kind.name());
    }
    println!("checks:");
    for check in checks::everywhere() {
        println!("  {:11} {}", check.family.name(), check.name);
    }
    for check in checks::with_server() {
        println!("  {:11} {} (NFS)", check.family.name(), check.name);
    }
}

/// One call of the command.
struct Run<'a> {
    #[cfg(target_os = "linux")]
    kit: Option<guest::Kit>,
    options: &'a FsMatrix,
    interrupt: Interrupt,
    progress: Progress,
    /// What became of each kind when the power went.
    after_power_loss: Mutex<Vec<(Kind, Finding)>>,
}

impl Run<'_> {
    /// Two at a time; the reports in the order of the jobs.
    fn all(&self, jobs: Vec<Job>) -> anyhow::Result<Vec<MountReport>> {
        const AT_ONCE: usize = 2;
        let queue = Mutex::new(jobs.into_iter().enumerate());
        let reports = Mutex::new(Vec::new());
        let work = || {
            loop {
                let next = queue.lock().ok().and_then(|mut queue| queue.next());
                let Some((place, job)) = next else { return };
                let report = self.one(&job);
                if let Ok(mut reports) = reports.lock() {
                    reports.push((place, report));
                }
            }
        };
        std::thread::scope(|scope| {
            for _ in 0..AT_ONCE {
                scope.spawn(work);
            }
        });
        self.interrupt.check()?;
        let mut reports: Vec<(usize, MountReport)> = reports.into_inner().unwrap_or_default();
        reports.sort_by_key(|(place, _)| *place);
        let mut reports: Vec<_> = reports.into_iter().map(|(_, report)| report).collect();
        for (kind, finding) in self
            .after_power_loss
            .lock()
            .into_iter()
            .flat_map(|mut all| std::mem::take(&mut *all))
        {
            let label = kind.to_string();
            let of_kind = reports.iter_mut().find(|report| report.mount == label);
            of_kind
                .context("a report of each kind")?
                .findings
                .push(finding);
        }
        // The power's own report has no findings left, and is of use only if it says why.
        reports.retain(|report| !report.findings.is_empty() || report.failed.is_some());
        Ok(reports)
    }

    fn one(&self, job: &Job) -> MountReport {
        let mut report = MountReport::new(job.label());
        let bar = self.progress.bar(&report.mount);
        let result = self.check(job, &mut report, &bar);
        bar.finish_and_clear();
        if let Err(error) = result {
            report.failed = Some(format!("{error:#}"));
        }
        if report.findings.is_empty() && report.failed.is_none() {
            return report;
        }
        self.progress.say(&format!(
            "{:9} {} hold, {} differ, {} broken, {} not run{}",
            report.mount,
            report.count(Verdict::Holds),
            report.count(Verdict::Differs),
            report.count(Verdict::Broken),
            report.count(Verdict::NotRun),
            report
                .failed
                .as_ref()
                .map_or(String::new(), |why| format!("; {why}"))
        ));
        report
    }

    fn check(&self, job: &Job, report: &mut MountReport, bar: &ProgressBar) -> anyhow::Result<()> {
        self.interrupt.check()?;
        bar.set_message("mounting");
        #[cfg(target_os = "linux")]
        if let (Job::PowerLoss(kinds), Some(kit)) = (job, &self.kit) {
            return self.lose_power(kinds, kit, bar);
        }
        #[cfg(target_os = "linux")]
        if let (Job::Here(kind), Some(kit)) = (job, &self.kit)
            && kind.place() == Place::Guest
        {
            return self.check_in_guest(*kind, kit, report, bar);
        }
        let mount = match job {
            Job::Here(kind) => mounts::mount(*kind)?,
            Job::User(_, dir) => {
                Mount::of_user(dir).with_context(|| format!("can't use {}", dir.display()))?
            }
            #[cfg(target_os = "linux")]
            Job::PowerLoss(_) => bail!("there is no guest to take the power from"),
        };
        report.driver.clone_from(&mount.driver);
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["fs-matrix", "inside", "--dir"]);
        command
            .arg(&mount.dir)
            .arg("--elsewhere")
            .arg(&mount.elsewhere);
        if let Some(small) = &mount.small {
            command.arg("--small").arg(small);
        }
        command.args(self.selection());
        let process = Process::start(command, &self.interrupt)?;
        let result = self.follow(&process, report, bar);
        drop(process);
        result
    }

    #[cfg(target_os = "linux")]
    fn check_in_guest(
        &self,
        kind: Kind,
        kit: &guest::Kit,
        report: &mut MountReport,
        bar: &ProgressBar,
    ) -> anyhow::Result<()> {
        report.driver = kit.driver(kind);
        let disks = guest::disks(kind, &kit.run_dir(), self.options.keep)?;
        let mut arguments = vec!["guest".to_owned(), format!("--kind={}", kind.name())];
        arguments.extend(self.selection());
        let qemu = guest::boot(kit, kind.name(), &disks, &arguments, &self.interrupt)?;
        let result = self.follow(&qemu, report, bar);
        drop(qemu);
        result.with_context(|| {
            format!(
                "the console's last lines: {}",
                guest::console_tail(kit, kind.name())
            )
        })
    }

    #[cfg(target_os = "linux")]
    fn lose_power(
        &self,
        kinds: &[Kind],
        kit: &guest::Kit,
        bar: &ProgressBar,
    ) -> anyhow::Result<()> {
        let sabotage = self.options.sabotage.as_ref();
        let sabotage = sabotage.and_then(clap::ValueEnum::to_possible_value);
        let sabotage = sabotage.map(|value| format!("--sabotage={}", value.get_name()));
        let power = power::PowerLoss {
            kit,
            interrupt: &self.interrupt,
            cuts: self.options.cuts,
            keep: self.options.keep,
            options: sabotage.into_iter().collect(),
        };
        let mut findings = power.run(kinds, bar)?;
        if let Ok(mut all) = self.after_power_loss.lock() {
            all.append(&mut findings);
        }
        Ok(())
    }

    /// The options that the checking side gets too.
    fn selection(&self) -> Vec<String> {
        let sabotage = self.options.sabotage.as_ref();
        let sabotage = sabotage.and_then(clap::ValueEnum::to_possible_value);
        let checks = self.options.check.iter();
        checks
            .map(|name| format!("--check={name}"))
            .chain(sabotage.map(|value| format!("--sabotage={}", value.get_name())))
            .collect()
    }

    /// Takes findings until the checking side says that it is done.
    fn follow(
        &self,
        process: &Process,
        report: &mut MountReport,
        bar: &ProgressBar,
    ) -> anyhow::Result<()> {
        let mut doing = "mounting".to_owned();
        loop {
            let line = process
                .next(PATIENCE)
                .with_context(|| format!("during: {doing}"))?;
            match line {
                None => bail!("it ended during: {doing}"),
                Some(Line::Checking(name)) => {
                    bar.set_message(name.clone());
                    doing = name;
                }
                Some(Line::Found(finding)) => {
                    bar.inc(1);
                    report.findings.push(finding);
                }
                Some(Line::Recovered(..) | Line::Remade(_) | Line::Committed(..)) => {}
                Some(Line::Done) => return Ok(()),
                Some(Line::Failed(why)) => bail!("during: {doing}: {why}"),
            }
        }
    }
}

/// One line on the terminal for each mount that is being checked; where there is no terminal, only what is said at the end of each.
struct Progress(MultiProgress);

impl Progress {
    fn new() -> Self {
        Self(MultiProgress::new())
    }

    fn bar(&self, name: &str) -> ProgressBar {
        let bar = ProgressBar::new(checks::everywhere().count() as u64);
        if std::io::stderr().is_terminal() {
            let template = "{prefix:9} {bar:30.cyan} {pos:>3} {elapsed:>4} {msg}";
            let style = ProgressStyle::with_template(template);
            bar.set_style(style.expect("the template is well-formed"));
            bar.enable_steady_tick(Duration::from_millis(200));
        }
        bar.set_prefix(name.to_owned());
        self.0.add(bar)
    }

    fn say(&self, text: &str) {
        self.0.suspend(|| eprintln!("{text}"));
    }
}
