//! What is done about the packages that a task needs.

use std::fmt::Write as _;
use std::time::Duration;

use super::problem::{Problem, State, is_offered, problem};

/// Lists older than this are updated before anything is installed.
const RECENT: Duration = Duration::from_hours(24);

/// Apt's package lists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lists {
    /// They are absent or old.
    Old,
    /// They look recent.
    Recent,
    /// This process updated them.
    Updated,
    /// This process failed to update them.
    Unreachable,
}

impl Lists {
    /// Judges lists that this process did not update. `age` is `None` where unknown or negative.
    pub(super) fn judge(present: bool, age: Option<Duration>) -> Self {
        if present && age.is_some_and(|age| age <= RECENT) {
            Self::Recent
        } else {
            Self::Old
        }
    }

    fn were_tried(self) -> bool {
        matches!(self, Self::Updated | Self::Unreachable)
    }
}

/// The machine and what may be done to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Machine {
    pub root: bool,
    pub has_apt: bool,
    /// False with `--no-install`.
    pub allowed: bool,
    pub lists: Lists,
}

impl Machine {
    pub(super) fn can_install(&self) -> bool {
        self.root && self.has_apt && self.allowed
    }
}

/// The next thing to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Nothing: all packages are as they must be.
    Done,
    /// Update the package lists.
    Update,
    /// Install or upgrade these.
    Install(Vec<&'static str>),
    /// Report these: nothing more can be done.
    Report(Vec<(State, Problem)>),
}

/// Decides what to do next about `packages`.
pub(super) fn decide(machine: &Machine, packages: &[State]) -> Step {
    let problems: Vec<_> = packages
        .iter()
        .filter_map(|state| Some((state.clone(), problem(state, packages)?)))
        .collect();
    if problems.is_empty() {
        return Step::Done;
    }
    // Each package is attempted once. Installing one can remove another, which is installed next.
    let attempted = problems.iter().all(|(state, _)| state.attempted);
    if !machine.can_install() || attempted {
        return Step::Report(problems);
    }
    if machine.lists == Lists::Old {
        return Step::Update;
    }
    // A family is installed as a whole: its packages are upgraded together.
    let affected = |state: &&State| {
        problems.iter().any(|(bad, _)| {
            let same = bad.package.name == state.package.name;
            same || bad.package.family.is_some() && bad.package.family == state.package.family
        })
    };
    let affected: Vec<&State> = packages.iter().filter(affected).collect();
    let offered: Vec<_> = affected
        .iter()
        .filter(|state| is_offered(state, packages))
        .collect();
    // Lists may be outdated: a package that they lack may be offered after an update.
    if offered.len() < affected.len() && !machine.lists.were_tried() {
        return Step::Update;
    }
    let install: Vec<_> = offered
        .into_iter()
        .filter(|state| !state.attempted)
        .map(|state| state.package.name)
        .collect();
    if install.is_empty() {
        return Step::Report(problems);
    }
    Step::Install(install)
}

/// States what is missing and how to install it.
pub(super) fn report(machine: &Machine, why: &str, problems: &[(State, Problem)]) -> String {
    let mut text = format!("missing for {why}:\n");
    let mut names = Vec::new();
    for (state, problem) in problems {
        let name = state.package.name;
        names.push(name);
        let offer = match (&state.offered, machine.lists) {
            _ if !machine.can_install() => String::new(),
            (_, Lists::Unreachable) => "; the package lists could not be updated".into(),
            (Some(offered), _) => format!("; the package archive offers {offered}"),
            (None, _) => "; the package archive does not offer it".into(),
        };
        let _ = writeln!(text, "  {name}: {problem}{offer}");
    }
    let names = names.join(" ");
    let sudo = if machine.root { "" } else { "sudo " };
    let command = format!("{sudo}apt-get update && {sudo}apt-get install {names}");
    text + &match machine.has_apt {
        true => format!("to install: {command}"),
        false => format!("apt-get is not available; on Debian: {command}"),
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;
    use crate::packages::package::Package;

    const STRACE: Package = Package::new("strace", "strace");
    const QEMU_UTILS: Package = Package::new("qemu-utils", "qemu-img");
    const RUSTC: Package = Package::new("rustc-web", "rustc").of_family("rust", "1.95");
    const SOURCE: Package = Package::new("rust-web-src", "src").of_family("rust", "1.95");
    const OLD: &str = "1.85.0+dfsg3-1~deb12u3";
    const NEW: &str = "1.96.0+dfsg1-1~deb12u2";
    const NEWER: &str = "1.97.0+dfsg1-1";

    const MACHINE: Machine = Machine {
        root: true,
        has_apt: true,
        allowed: true,
        lists: Lists::Recent,
    };

    fn with(lists: Lists) -> Machine {
        Machine { lists, ..MACHINE }
    }

    /// Empty strings stand for versions that do not exist.
    fn state(package: Package, installed: &str, offered: &str) -> State {
        let version = |version: &str| (!version.is_empty()).then(|| version.to_owned());
        State {
            package,
            present: !installed.is_empty(),
            installed: version(installed),
            offered: version(offered),
            attempted: false,
        }
    }

    #[rstest]
    #[case(false, Some(0), Lists::Old)]
    #[case(true, None, Lists::Old)]
    #[case(true, Some(0), Lists::Recent)]
    #[case(true, Some(24 * 3600), Lists::Recent)]
    #[case(true, Some(24 * 3600 + 1), Lists::Old)]
    fn lists_are_recent_for_a_day(
        #[case] present: bool,
        #[case] age: Option<u64>,
        #[case] judged: Lists,
    ) {
        assert_eq!(Lists::judge(present, age.map(Duration::from_secs)), judged);
    }

    #[rstest]
    // Without requirements, what is present is enough.
    #[case(Lists::Old, &[(STRACE, "6.1", "")], Step::Done)]
    #[case(Lists::Old, &[(STRACE, "", "6.1")], Step::Update)]
    #[case(Lists::Recent, &[(STRACE, "", "6.1")], Step::Install(vec!["strace"]))]
    #[case(Lists::Updated, &[(STRACE, "", "6.1")], Step::Install(vec!["strace"]))]
    #[case(Lists::Unreachable, &[(STRACE, "", "6.1")], Step::Install(vec!["strace"]))]
    #[case(Lists::Recent, &[(STRACE, "", "")], Step::Update)]
    // A family that is old, incomplete or mixed is upgraded as a whole.
    #[case(Lists::Old, &[(RUSTC, NEW, ""), (SOURCE, NEW, "")], Step::Done)]
    #[case(Lists::Old, &[(RUSTC, OLD, NEW), (SOURCE, OLD, NEW)], Step::Update)]
    #[case(Lists::Recent, &[(RUSTC, OLD, NEW), (SOURCE, OLD, NEW)],
        Step::Install(vec!["rustc-web", "rust-web-src"]))]
    #[case(Lists::Recent, &[(RUSTC, NEW, NEWER), (SOURCE, "", NEWER)],
        Step::Install(vec!["rustc-web", "rust-web-src"]))]
    #[case(Lists::Recent, &[(RUSTC, NEW, NEWER), (SOURCE, NEWER, NEWER)],
        Step::Install(vec!["rustc-web", "rust-web-src"]))]
    // Recent lists that offer too little are updated once.
    #[case(Lists::Recent, &[(RUSTC, "", OLD), (SOURCE, "", OLD)], Step::Update)]
    #[case(Lists::Recent, &[(RUSTC, "", NEW), (SOURCE, "", NEWER)], Step::Update)]
    // What is offered is installed, also where another package is not.
    #[case(Lists::Updated, &[(STRACE, "", "6.1"), (RUSTC, "", OLD), (SOURCE, "", OLD)],
        Step::Install(vec!["strace"]))]
    fn next_step(
        #[case] lists: Lists,
        #[case] packages: &[(Package, &str, &str)],
        #[case] step: Step,
    ) {
        let packages: Vec<_> = packages
            .iter()
            .map(|(package, installed, offered)| state(*package, installed, offered))
            .collect();
        assert_eq!(decide(&with(lists), &packages), step);
    }

    #[rstest]
    #[case(Machine { root: false, ..with(Lists::Old) }, OLD)]
    #[case(Machine { allowed: false, ..with(Lists::Old) }, OLD)]
    #[case(Machine { has_apt: false, ..with(Lists::Old) }, OLD)]
    #[case(with(Lists::Updated), OLD)]
    #[case(with(Lists::Unreachable), OLD)]
    #[case(with(Lists::Updated), "")]
    fn a_compiler_that_stays_old_is_reported(#[case] machine: Machine, #[case] offered: &str) {
        let rustc = state(RUSTC, OLD, offered);
        let problem = Problem::TooOld {
            found: OLD.into(),
            needed: "1.95",
        };
        let packages = [rustc.clone(), state(SOURCE, NEW, offered)];
        let Step::Report(problems) = decide(&machine, &packages) else {
            panic!("not a report");
        };
        assert_eq!(problems[0], (rustc, problem));
    }

    #[rstest]
    #[case(&[(STRACE, "", true)], &[])]
    // Installing strace removed the other.
    #[case(&[(STRACE, "6.1", true), (QEMU_UTILS, "", false)], &["qemu-utils"])]
    #[case(&[(STRACE, "", true), (QEMU_UTILS, "", false)], &["qemu-utils"])]
    #[case(&[(STRACE, "6.1", true), (QEMU_UTILS, "", true)], &[])]
    // The archive does not offer the other.
    #[case(&[(STRACE, "", true), (SOURCE, "", false)], &[])]
    fn each_package_is_attempted_once(
        #[case] packages: &[(Package, &str, bool)],
        #[case] expected: &[&str],
    ) {
        let state = |&(package, installed, attempted): &(Package, &str, bool)| State {
            attempted,
            ..state(
                package,
                installed,
                if package == SOURCE { OLD } else { "6.1" },
            )
        };
        let packages: Vec<_> = packages.iter().map(state).collect();
        match decide(&with(Lists::Updated), &packages) {
            Step::Install(names) => assert_eq!(names, expected),
            Step::Report(_) => assert!(expected.is_empty()),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_family_of_two_versions_is_reported_where_nothing_installs() {
        let source = state(SOURCE, NEWER, "");
        let problem = Problem::Differs {
            found: NEWER.into(),
            other: "rustc-web",
            version: NEW.into(),
        };
        let machine = Machine {
            root: false,
            ..MACHINE
        };
        let step = decide(&machine, &[state(RUSTC, NEW, ""), source.clone()]);
        assert_eq!(step, Step::Report(vec![(source, problem)]));
    }

    #[test]
    fn a_removed_package_whose_files_remain_is_missing() {
        let left = State {
            installed: None,
            ..state(RUSTC, OLD, NEW)
        };
        assert_eq!(problem(&left, &[]), Some(Problem::Missing));
    }

    #[rstest]
    #[case(
        Machine { root: false, ..with(Lists::Old) }, "",
        "missing for lints:\n  \
         rustc-web: 1.85.0+dfsg3-1~deb12u3 is installed, 1.95 or newer is needed\n\
         to install: sudo apt-get update && sudo apt-get install rustc-web"
    )]
    #[case(
        Machine { allowed: false, ..with(Lists::Old) }, "",
        "missing for lints:\n  \
         rustc-web: 1.85.0+dfsg3-1~deb12u3 is installed, 1.95 or newer is needed\n\
         to install: apt-get update && apt-get install rustc-web"
    )]
    #[case(
        with(Lists::Updated),
        OLD,
        "missing for lints:\n  \
         rustc-web: 1.85.0+dfsg3-1~deb12u3 is installed, 1.95 or newer is needed; \
         the package archive offers 1.85.0+dfsg3-1~deb12u3\n\
         to install: apt-get update && apt-get install rustc-web"
    )]
    #[case(
        with(Lists::Unreachable),
        OLD,
        "missing for lints:\n  \
         rustc-web: 1.85.0+dfsg3-1~deb12u3 is installed, 1.95 or newer is needed; \
         the package lists could not be updated\n\
         to install: apt-get update && apt-get install rustc-web"
    )]
    #[case(
        Machine { root: false, has_apt: false, ..MACHINE }, "",
        "missing for lints:\n  \
         rustc-web: 1.85.0+dfsg3-1~deb12u3 is installed, 1.95 or newer is needed\n\
         apt-get is not available; on Debian: sudo apt-get update && sudo apt-get install rustc-web"
    )]
    fn a_report_has_versions_and_the_command(
        #[case] machine: Machine,
        #[case] offered: &str,
        #[case] text: &str,
    ) {
        let rustc = state(RUSTC, OLD, offered);
        let problem = problem(&rustc, &[]).expect("too old");
        assert_eq!(report(&machine, "lints", &[(rustc, problem)]), text);
    }
}
