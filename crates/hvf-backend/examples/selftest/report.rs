//! The result of each step, and the report.

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt::Write as _;
use std::process::Command;

use hvf_backend::{CreateVmError, UnsupportedFunction};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// A step of the test.
#[derive(Clone, Copy)]
pub(crate) struct Step {
    pub name: &'static str,
    /// What it shows if it passes.
    pub shows: &'static str,
    pub run: fn(&mut Measured) -> Outcome,
}

/// What a step has measured, by names.
#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(transparent)]
pub(crate) struct Measured(BTreeMap<String, Value>);

impl Measured {
    pub(crate) fn add(&mut self, name: impl Into<String>, value: impl Into<Value>) {
        self.0.insert(name.into(), value.into());
    }

    /// Adds a number that is read as hexadecimal.
    pub(crate) fn add_hex(&mut self, name: impl Into<String>, value: u64) {
        self.add(name, format!("{value:#x}"));
    }
}

pub(crate) type Outcome = Result<(), NotPassed>;

/// Why a step did not pass.
#[derive(Debug)]
pub(crate) enum NotPassed {
    /// This Mac, this macOS or this build does not have what the step tests.
    Unsupported(String),
    Failed(String),
}

impl<E: Into<Box<dyn Error>>> From<E> for NotPassed {
    fn from(error: E) -> Self {
        let error = error.into();
        let mut source: Option<&(dyn Error + 'static)> = Some(&*error);
        while let Some(cause) = source {
            let unsupported = matches!(
                cause.downcast_ref(),
                Some(CreateVmError::UnsupportedFunction(_))
            );
            if unsupported || cause.is::<UnsupportedFunction>() {
                return Self::Unsupported(error.to_string());
            }
            source = cause.source();
        }
        Self::Failed(error.to_string())
    }
}

/// Fails the step unless the condition holds.
pub(crate) fn ensure(condition: bool, otherwise: impl FnOnce() -> String) -> Outcome {
    match condition {
        true => Ok(()),
        false => Err(NotPassed::Failed(otherwise())),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Status {
    Pass,
    Fail,
    Unsupported,
}

/// The result of one step.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct StepReport {
    pub name: String,
    pub shows: String,
    pub status: Status,
    /// Why it did not pass.
    pub reason: Option<String>,
    pub measured: Measured,
}

#[derive(Debug, Serialize)]
pub(crate) struct Report {
    /// The version of the crate.
    pub version: &'static str,
    pub system: String,
    pub chip: String,
    pub steps: Vec<StepReport>,
}

impl Step {
    /// Runs the step in this process.
    pub(crate) fn report(&self) -> StepReport {
        let mut measured = Measured::default();
        let outcome = (self.run)(&mut measured);
        let mut report = self.not_passed(Status::Pass, None);
        report.measured = measured;
        match outcome {
            Ok(()) => {}
            Err(NotPassed::Unsupported(reason)) => {
                (report.status, report.reason) = (Status::Unsupported, Some(reason));
            }
            Err(NotPassed::Failed(reason)) => {
                (report.status, report.reason) = (Status::Fail, Some(reason));
            }
        }
        report
    }

    /// Returns a report without measurements.
    pub(crate) fn not_passed(&self, status: Status, reason: Option<String>) -> StepReport {
        StepReport {
            name: self.name.to_owned(),
            shows: self.shows.to_owned(),
            status,
            reason,
            measured: Measured::default(),
        }
    }
}

impl Report {
    pub(crate) fn new(steps: Vec<StepReport>) -> Self {
        let output = |program: &str, arguments: &[&str]| {
            let output = Command::new(program).args(arguments).output().ok()?;
            let text = String::from_utf8(output.stdout).ok()?;
            (output.status.success()).then(|| text.trim().to_owned())
        };
        let (system, chip) = if cfg!(target_os = "macos") {
            let version = output("sw_vers", &["-productVersion"]);
            let build = output("sw_vers", &["-buildVersion"]);
            let chip = output("sysctl", &["-n", "machdep.cpu.brand_string"]);
            let unknown = || "unknown".to_owned();
            let version = version.unwrap_or_else(unknown);
            let build = build.unwrap_or_else(unknown);
            let system = format!("macOS {version} ({build})");
            (system, chip.unwrap_or_else(unknown))
        } else {
            ("a fake of the framework".to_owned(), "emulated".to_owned())
        };
        Self {
            version: env!("CARGO_PKG_VERSION"),
            system,
            chip,
            steps,
        }
    }

    pub(crate) fn has_failed(&self) -> bool {
        self.steps.iter().any(|step| step.status == Status::Fail)
    }

    /// Returns the report as Markdown.
    pub(crate) fn to_markdown(&self) -> String {
        let Self {
            version,
            system,
            chip,
            steps,
        } = self;
        let mut text = format!("hvf-backend {version}, {system}, {chip}\n\n");
        text += "| step | result | shows |\n|---|---|---|\n";
        for step in steps {
            let result = match step.status {
                Status::Pass => "pass",
                Status::Fail => "**FAIL**",
                Status::Unsupported => "unsupported",
            };
            let _ = writeln!(text, "| {} | {result} | {} |", step.name, step.shows);
        }
        for step in steps {
            let _ = write!(text, "\n{}:", step.name);
            if let Some(reason) = &step.reason {
                let _ = write!(text, " {reason}");
            }
            text.push('\n');
            for (name, value) in &step.measured.0 {
                let value = value.as_str().map_or(value.to_string(), str::to_owned);
                let _ = writeln!(text, "- {name}: {value}");
            }
        }
        text
    }
}
