//! The limit of a program to the crates that a change touches.

/// Limits `task`, which tests the crates `tested`, to those of them that are in `changed`: adds
/// them to `only`. An empty list limits nothing. Returns false, and prints it, if nothing is left.
pub fn limit(only: &mut Vec<String>, changed: &[String], tested: &[&str], task: &str) -> bool {
    if changed.is_empty() {
        return true;
    }
    let is_tested = |name: &&String| tested.contains(&name.as_str());
    only.extend(changed.iter().filter(is_tested).cloned());
    if only.is_empty() {
        println!("no crate that {task} tests has changed");
    }
    !only.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changed_crates_limit_a_program_to_those_that_it_tests() {
        let names = |names: &[&str]| names.iter().map(|name| (*name).into()).collect::<Vec<_>>();
        let limited = |changed: &[&str]| {
            let mut only = Vec::new();
            let left = limit(&mut only, &names(changed), &["a", "b"], "mutants");
            (left, only)
        };
        assert_eq!(limited(&[]), (true, names(&[])));
        assert_eq!(limited(&["c", "b"]), (true, names(&["b"])));
        assert_eq!(limited(&["c"]), (false, names(&[])));
    }
}
