//! Each set of features of each published crate.

use std::collections::BTreeMap;

use xshell::{Shell, cmd};

use super::Metadata;

/// Where the sets are built, without warnings.
const TARGET_DIR: &str = "target/features";

/// Builds each published crate with each set of its features. A crate is built alone, because
/// another one could turn its features on.
pub(crate) fn check_feature_sets(sh: &Shell) -> anyhow::Result<()> {
    let metadata = Metadata::read(sh, &["--locked", "--no-deps"])?;
    let _strict = sh.push_env("RUSTFLAGS", "-D warnings");
    let _dir = sh.push_env("CARGO_TARGET_DIR", TARGET_DIR);
    for package in metadata.published() {
        for features in feature_sets(&package.features) {
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

/// Returns every set of features, the empty one first. `default` names others.
fn feature_sets(features: &BTreeMap<String, Vec<String>>) -> Vec<Vec<&str>> {
    let mut sets = vec![Vec::new()];
    for feature in features.keys().filter(|name| *name != "default") {
        let with = sets.iter().map(|set: &Vec<&str>| {
            let mut set = set.clone();
            set.push(feature);
            set
        });
        sets.extend(with.collect::<Vec<_>>());
    }
    sets
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_set_of_features_is_built_once() {
        let features = ["a", "b", "default"].map(|name| (name.to_owned(), Vec::new()));
        let expected: [&[&str]; 4] = [&[], &["a"], &["b"], &["a", "b"]];
        assert_eq!(feature_sets(&features.into()), expected);
    }
}
