//! Each set of features of each published crate.

use std::collections::BTreeMap;

use serde::Deserialize;
use xshell::{Shell, cmd};

/// Where the sets are built, without warnings.
const TARGET_DIR: &str = "target/features";

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    features: BTreeMap<String, Vec<String>>,
    manifest_path: String,
}

/// Builds each published crate with each set of its features. A crate is built alone, because
/// another one could turn its features on.
pub(crate) fn check_feature_sets(sh: &Shell) -> anyhow::Result<()> {
    let metadata = cmd!(sh, "cargo metadata --format-version 1 --locked --no-deps");
    let metadata: Metadata = serde_json::from_str(&metadata.quiet().read()?)?;
    let _strict = sh.push_env("RUSTFLAGS", "-D warnings");
    let _dir = sh.push_env("CARGO_TARGET_DIR", TARGET_DIR);
    for package in metadata.packages.iter().filter(|it| it.is_published()) {
        for features in package.feature_sets() {
            let (name, features) = (&package.name, features.join(","));
            let check = cmd!(
                sh,
                "cargo check --locked --package {name} --no-default-features --features {features}"
            );
            check.run()?;
        }
    }
    Ok(())
}

impl Package {
    fn is_published(&self) -> bool {
        let dir = std::path::Path::new(&self.manifest_path).ancestors().nth(2);
        dir.is_some_and(|dir| dir.ends_with("crates"))
    }

    /// Returns every set of features, the empty one first. `default` names others.
    fn feature_sets(&self) -> Vec<Vec<&str>> {
        let mut sets = vec![Vec::new()];
        for feature in self.features.keys().filter(|name| *name != "default") {
            let with = sets.iter().map(|set: &Vec<&str>| {
                let mut set = set.clone();
                set.push(feature);
                set
            });
            sets.extend(with.collect::<Vec<_>>());
        }
        sets
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_set_of_features_is_built_once() {
        let features = ["a", "b", "default"].map(|name| (name.to_owned(), Vec::new()));
        let package = Package {
            name: "some".into(),
            features: features.into(),
            manifest_path: "/w/crates/some/Cargo.toml".into(),
        };
        assert!(package.is_published());
        let expected: [&[&str]; 4] = [&[], &["a"], &["b"], &["a", "b"]];
        assert_eq!(package.feature_sets(), expected);
    }
}
