//! Debian's package archive, as this machine reaches it.

use anyhow::Context;
use xshell::{Shell, cmd};

/// The Debian release.
pub(super) const SUITE: &str = "bookworm";

/// How this machine reaches Debian's package archive.
pub(super) struct Archive {
    pub mirror: String,
    pub sources: String,
    /// Proxies, timeouts and the like.
    pub settings: String,
}

impl Archive {
    pub(super) fn of_this_machine(sh: &Shell) -> anyhow::Result<Self> {
        let format = "$(CODENAME) $(REPO_URI) $(RELEASE) $(COMPONENT)";
        let debian = ["Created-By: Packages", "Origin: Debian"];
        let targets = cmd!(sh, "apt-get indextargets --format {format} {debian...}");
        let targets = targets.quiet().read()?;
        let format = "%f \"%v\";%n";
        let settings = cmd!(sh, "apt-config dump --format {format} Acquire");
        let settings = settings.quiet().read()?;
        // What is fetched depends on the packages that are installed, not on the network.
        let settings = settings
            .lines()
            .filter(|line| !line.starts_with("Acquire::IndexTargets"))
            .flat_map(|line| [line, "\n"])
            .collect();
        let (mirror, sources) = sources(&targets).with_context(|| {
            format!("no Debian {SUITE} archive is configured for apt; run apt-get update")
        })?;
        Ok(Self {
            mirror,
            sources,
            settings,
        })
    }
}

/// Returns the mirror of the suite, and apt's sources with its updates.
fn sources(targets: &str) -> Option<(String, String)> {
    let mut mirror = None;
    let mut sources = String::new();
    for line in targets.lines() {
        let mut words = line.split(' ');
        let (codename, source) = (words.next()?, words.collect::<Vec<_>>());
        if codename == SUITE {
            mirror = source.first().map(|uri| (*uri).to_owned());
        }
        if codename.starts_with(SUITE) {
            sources += &format!("deb {}\n", source.join(" "));
        }
    }
    Some((mirror?, sources))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_those_of_the_suite_and_its_updates() {
        let targets = "trixie http://a/debian trixie main\n\
            bookworm http://a/debian bookworm main\n\
            bookworm-security http://a/security bookworm-security main\n";
        let (mirror, lines) = sources(targets).expect("a mirror");
        assert_eq!(mirror, "http://a/debian");
        assert_eq!(
            lines,
            "deb http://a/debian bookworm main\n\
             deb http://a/security bookworm-security main\n"
        );
        assert_eq!(sources("bookworm-security http://a/security s main"), None);
    }
}
