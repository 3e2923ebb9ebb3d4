//! Metrics as Prometheus text.

use std::fmt::Write as _;
use std::fs::Permissions;
use std::io::{self, Write as _};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use lazy_restore::ServerMetrics;

/// A file that holds the latest metrics.
#[derive(Debug)]
pub struct MetricsFile {
    path: PathBuf,
}

impl MetricsFile {
    pub fn new(path: &Path) -> Self {
        let path = path.to_owned();
        Self { path }
    }

    /// Replaces the file, so that a reader finds all metrics of one time. It is not synced.
    pub fn write(&self, metrics: &ServerMetrics) -> io::Result<()> {
        let dir = match self.path.parent() {
            Some(dir) if !dir.as_os_str().is_empty() => dir,
            _ => Path::new("."),
        };
        let mut file = tempfile::NamedTempFile::new_in(dir)?;
        file.write_all(text(metrics).as_bytes())?;
        // They contain no bytes of a guest.
        let permissions = Permissions::from_mode(0o644);
        file.as_file().set_permissions(permissions)?;
        file.persist(&self.path).map_err(|error| error.error)?;
        Ok(())
    }
}

/// Returns metrics in the text format of Prometheus.
fn text(metrics: &ServerMetrics) -> String {
    let mut text = String::new();
    let mut add = |name: &str, kind: &str, help: &str, samples: &[(String, String)]| {
        let _ = writeln!(text, "# HELP ramsnap_serve_{name} {help}");
        let _ = writeln!(text, "# TYPE ramsnap_serve_{name} {kind}");
        for (suffix, value) in samples {
            let _ = writeln!(text, "ramsnap_serve_{name}{suffix} {value}");
        }
    };
    let plain = |value: u64| [(String::new(), value.to_string())];
    add(
        "vms",
        "gauge",
        "VMs that are being served.",
        &plain(metrics.vms),
    );
    let label = |name: &str, value: &str, number: u64| {
        (format!("{{{name}=\"{value}\"}}"), number.to_string())
    };
    let ended = [
        label("end", "filled", metrics.filled_vms),
        label("end", "exited", metrics.exited_vms),
        label("end", "failed", metrics.failed_vms),
    ];
    add(
        "ended_vms_total",
        "counter",
        "VMs that are no longer served.",
        &ended,
    );
    add(
        "faults_total",
        "counter",
        "Page faults that were handled.",
        &plain(metrics.faults),
    );
    let bytes = [
        label("source", "fault", metrics.bytes_by_faults),
        label("source", "working_set", metrics.bytes_by_working_set),
        label("source", "prefetch", metrics.bytes_by_prefetch),
        label("source", "zeros", metrics.zero_bytes),
    ];
    add(
        "filled_bytes_total",
        "counter",
        "Bytes of RAM that were filled.",
        &bytes,
    );
    let removed = plain(metrics.removed_bytes);
    add(
        "removed_bytes_total",
        "counter",
        "Bytes that VMs have discarded.",
        &removed,
    );
    let poisoned = plain(metrics.poisoned_bytes);
    add(
        "poisoned_bytes_total",
        "counter",
        "Bytes that cannot be read.",
        &poisoned,
    );
    let mut histogram: Vec<_> = metrics
        .fault_times
        .iter()
        .map(|(micros, faults)| {
            let bound = format!("{}", *micros as f64 / 1e6);
            (format!("_bucket{{le=\"{bound}\"}}"), faults.to_string())
        })
        .collect();
    histogram.push((
        "_bucket{le=\"+Inf\"}".to_owned(),
        metrics.faults.to_string(),
    ));
    histogram.push((
        "_sum".to_owned(),
        metrics.fault_time.as_secs_f64().to_string(),
    ));
    histogram.push(("_count".to_owned(), metrics.faults.to_string()));
    let help = "Time from the receipt of a fault until its page and neighbors are filled.";
    add("fault_seconds", "histogram", help, &histogram);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_in_the_format_of_prometheus() {
        let text = text(&ServerMetrics::default());
        let families = text.lines().filter(|line| line.starts_with("# TYPE"));
        assert_eq!(families.count(), 7);
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let (name, value) = line.rsplit_once(' ').unwrap();
            assert!(name.starts_with("ramsnap_serve_"), "{line}");
            value.parse::<f64>().unwrap();
        }
        for part in [
            "ramsnap_serve_filled_bytes_total{source=\"prefetch\"} 0",
            "ramsnap_serve_fault_seconds_bucket{le=\"+Inf\"} 0",
            "ramsnap_serve_fault_seconds_sum 0",
        ] {
            assert!(text.contains(part), "{part}");
        }
    }
}
