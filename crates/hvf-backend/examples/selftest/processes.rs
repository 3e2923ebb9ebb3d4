//! Running each step in a process of its own.

use std::env;
use std::io::Read as _;
use std::process::{Child, Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::report::{Report, Status, Step, StepReport};

/// A step that takes longer hangs.
const TIME_LIMIT: Duration = Duration::from_secs(60);

const USAGE: &str = "usage: selftest [--json]";

pub(crate) fn main(steps: &[Step]) -> ExitCode {
    let arguments: Vec<_> = env::args().skip(1).collect();
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    let json = match arguments[..] {
        [] => false,
        ["--json"] => true,
        ["--step", name] => return run_here(steps, name),
        ["--help"] => {
            println!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    let report = Report::new(steps.iter().map(run_apart).collect());
    if json {
        let text = serde_json::to_string_pretty(&report).expect("names and numbers");
        println!("{text}");
    } else {
        print!("{}", report.to_markdown());
    }
    ExitCode::from(u8::from(report.has_failed()))
}

/// Runs a step in this process, and prints its result as JSON.
fn run_here(steps: &[Step], name: &str) -> ExitCode {
    let Some(step) = steps.iter().find(|step| step.name == name) else {
        eprintln!("there is no step {name}");
        return ExitCode::from(2);
    };
    let report = serde_json::to_string(&step.report()).expect("names and numbers");
    println!("{report}");
    ExitCode::SUCCESS
}

/// Runs a step in a process of its own.
fn run_apart(step: &Step) -> StepReport {
    eprintln!("{} ...", step.name);
    match output(step) {
        Ok(report) => report,
        Err(reason) => step.not_passed(Status::Fail, Some(reason)),
    }
}

fn output(step: &Step) -> Result<StepReport, String> {
    let program =
        env::current_exe().map_err(|error| format!("no path of this program: {error}"))?;
    let mut command = Command::new(program);
    command.args(["--step", step.name]).stdout(Stdio::piped());
    let child = command.spawn();
    let mut child = child.map_err(|error| format!("failed to start the step: {error}"))?;
    let mut stdout = child.stdout.take().ok_or("the step has no output")?;
    let reader = thread::spawn(move || {
        let mut text = String::new();
        stdout.read_to_string(&mut text).map(|_| text)
    });
    let ended = wait(&mut child)?;
    let text = reader.join().map_err(|_| "failed to read the result")?;
    let text = text.map_err(|error| format!("failed to read the result: {error}"))?;
    serde_json::from_str(&text).map_err(|_| format!("the step ended without a result: {ended}"))
}

/// Waits for the process. One that hangs is ended.
fn wait(child: &mut Child) -> Result<String, String> {
    let began = Instant::now();
    while began.elapsed() < TIME_LIMIT {
        match child.try_wait() {
            Ok(Some(status)) => return Ok(status.to_string()),
            Ok(None) => thread::sleep(Duration::from_millis(5)),
            Err(error) => return Err(format!("failed to wait for the step: {error}")),
        }
    }
    let _ = child.kill();
    let _ = child.wait();
    Err(format!(
        "the step did not end in {} s",
        TIME_LIMIT.as_secs()
    ))
}
