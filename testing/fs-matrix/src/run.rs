//! Mounts what is to be checked, has it checked, and collects what is found.

use std::cmp::Reverse;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use file_systems::Storage;
use harness::interrupt::Interrupt;
use harness::process::{Process, this_program};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use super::checks;
use super::finding::{Finding, Line, Verdict};
use super::kind::{Kind, Place, place};
use super::mounts::{self, Images, Mount};
use super::options::FsMatrix;
use super::report::MountReport;
#[cfg(target_os = "linux")]
use super::{guest, power};

/// One mount to check.
pub(crate) enum Job {
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

    /// Compares jobs by how long they take.
    fn length(&self) -> u32 {
        match self {
            #[cfg(target_os = "linux")]
            Self::PowerLoss(_) => 3,
            Self::Here(kind) => match (place(kind), kind.storage) {
                (Place::Guest, Storage::Nfs { .. }) => 2,
                (Place::Guest, _) => 1,
                (Place::Here | Place::Nowhere, _) => 0,
            },
            Self::User(..) => 0,
        }
    }
}

/// The longest that one check may take, and mounting before the first: two minutes have been seen,
/// beside two other guests.
const PATIENCE: Duration = Duration::from_secs(600);

/// One call of the command.
pub(crate) struct Run<'a> {
    #[cfg(target_os = "linux")]
    kit: Option<guest::Kit>,
    options: &'a FsMatrix,
    images: Images,
    interrupt: Interrupt,
    progress: Progress,
    /// What became of each kind when the power went.
    after_power_loss: Mutex<Vec<(Kind, Finding)>>,
}

impl<'a> Run<'a> {
    pub(crate) fn new(
        options: &'a FsMatrix,
        interrupt: Interrupt,
        #[cfg(target_os = "linux")] kit: Option<guest::Kit>,
    ) -> Self {
        Self {
            #[cfg(target_os = "linux")]
            kit,
            options,
            images: Images {
                dir: PathBuf::from("target/fs-matrix/run"),
                keep: options.keep,
            },
            interrupt,
            progress: Progress::new(),
            after_power_loss: Mutex::default(),
        }
    }

    /// Runs three jobs at a time, the longest first: one of three usually waits for a server or a
    /// sync. Returns the reports in the order of the jobs.
    pub(crate) fn all(&self, jobs: Vec<Job>) -> anyhow::Result<Vec<MountReport>> {
        const AT_ONCE: usize = 3;
        let mut queue: Vec<_> = jobs.into_iter().enumerate().collect();
        queue.sort_by_key(|(_, job)| Reverse(job.length()));
        let queue = Mutex::new(queue.into_iter());
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
            && place(kind) == Place::Guest
        {
            return self.check_in_guest(kind, kit, report, bar);
        }
        let mount = match job {
            Job::Here(kind) => mounts::mount(kind, &self.images)?,
            Job::User(_, dir) => {
                Mount::of_user(dir).with_context(|| format!("can't use {}", dir.display()))?
            }
            #[cfg(target_os = "linux")]
            Job::PowerLoss(_) => bail!("a power cut requires a guest"),
        };
        report.driver.clone_from(&mount.driver);
        let mut command = Command::new(this_program()?);
        command.args(["worker", "--dir"]);
        command
            .stdin(Stdio::null())
            .arg(&mount.dir)
            .arg("--elsewhere")
            .arg(&mount.elsewhere);
        if let Some(small) = &mount.small {
            command.arg("--small").arg(small);
        }
        command.args(self.selection(None));
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
        let say = |text: &str| self.progress.say(&format!("{kind}: {text}"));
        kit.console(kind.name).heard_out(say, || {
            report.findings.clear();
            bar.set_position(0);
            self.boot_and_follow(kind, kit, report, bar)
        })
    }

    #[cfg(target_os = "linux")]
    fn boot_and_follow(
        &self,
        kind: Kind,
        kit: &guest::Kit,
        report: &mut MountReport,
        bar: &ProgressBar,
    ) -> anyhow::Result<()> {
        let disks = guest::disks(kind, &kit.run_dir(), self.options.keep)?;
        let mut arguments = vec!["guest".to_owned(), format!("--kind={}", kind.name)];
        arguments.extend(self.selection(Some(kind)));
        let qemu = guest::boot(kit, kind.name, &disks, &arguments, &self.interrupt)?;
        let result = self.follow(&qemu, report, bar);
        drop(qemu);
        result.with_context(|| {
            format!(
                "the console's last lines: {}",
                kit.console(kind.name).tail()
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
        let mutant = self.options.mutant.as_ref();
        let mutant = mutant.and_then(clap::ValueEnum::to_possible_value);
        let mutant = mutant.map(|value| format!("--mutant={}", value.get_name()));
        let power = power::PowerLoss {
            kit,
            interrupt: &self.interrupt,
            cuts: self.options.cuts,
            keep: self.options.keep,
            options: mutant.into_iter().collect(),
        };
        let mut findings = power.run(kinds, bar)?;
        if let Ok(mut all) = self.after_power_loss.lock() {
            all.append(&mut findings);
        }
        Ok(())
    }

    /// The options that the checking side gets too.
    fn selection(&self, kind: Option<Kind>) -> Vec<String> {
        let slow = kind
            .filter(|_| self.options.quick)
            .map_or(&[][..], |kind| kind.slow);
        let skip = slow
            .iter()
            .map(|check| format!("--skip={}", checks::slow(*check)));
        let mutant = self.options.mutant.as_ref();
        let mutant = mutant.and_then(clap::ValueEnum::to_possible_value);
        let checks = self.options.check.iter();
        checks
            .map(|name| format!("--check={name}"))
            .chain(mutant.map(|value| format!("--mutant={}", value.get_name())))
            .chain(skip)
            .collect()
    }

    /// Takes findings until the checking side says that it is done.
    fn follow(
        &self,
        process: &Process,
        report: &mut MountReport,
        bar: &ProgressBar,
    ) -> anyhow::Result<()> {
        let mut checking = None;
        loop {
            let line = Line::next(process, PATIENCE).map_err(|error| match &checking {
                None => error.context("mounting"),
                // It was heard of: not the guest is silent, a check hangs.
                Some(check) => anyhow!("during: {check}: {error:#}"),
            })?;
            let doing = || checking.as_deref().unwrap_or("mounting");
            match line {
                None => bail!("it ended during: {}", doing()),
                Some(Line::Checking(name)) => {
                    bar.set_message(name.clone());
                    checking = Some(name);
                }
                Some(Line::Found(finding)) => {
                    bar.inc(1);
                    report.findings.push(finding);
                }
                Some(Line::Recovered(..) | Line::Remade(_) | Line::Committed(..)) => {}
                Some(Line::Done) => return Ok(()),
                Some(Line::Failed(why)) => bail!("during: {}: {why}", doing()),
            }
        }
    }
}

/// One line on the terminal for each mount that is being checked; where there is no terminal, only
/// what is said at the end of each.
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
