//! Metrics as Prometheus text.

use std::fmt::Write as _;
use std::fs::Permissions;
use std::io::{self, Write as _};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use lazy_restore::{ServedVm, ServerMetrics, VmProcess};

use super::counted::ImageBytes;

/// A file that holds the latest metrics.
#[derive(Debug)]
pub struct MetricsFile {
    path: PathBuf,
    socket: String,
    images: Arc<ImageBytes>,
}

impl MetricsFile {
    pub fn new(path: &Path, socket: &str, images: Arc<ImageBytes>) -> Self {
        Self {
            path: path.to_owned(),
            socket: socket.to_owned(),
            images,
        }
    }

    /// Writes metrics before any VM is served, so that a file that cannot be written is an error.
    pub fn write_first(&self, metrics: &ServerMetrics) -> anyhow::Result<()> {
        let path = &self.path;
        self.write(metrics, &[])
            .with_context(|| format!("cannot write the metrics to {path:?}"))
    }

    /// Replaces the file, so that a reader finds all metrics of one time. It is not synced.
    pub fn write(&self, metrics: &ServerMetrics, vms: &[Arc<ServedVm>]) -> io::Result<()> {
        let dir = match self.path.parent() {
            Some(dir) if !dir.as_os_str().is_empty() => dir,
            _ => Path::new("."),
        };
        let images = self.images.all().enumerate().map(|(layer, (path, bytes))| {
            let path = path.to_string_lossy();
            (
                format!("{{image=\"{}\",layer=\"{layer}\"}}", escaped(&path)),
                bytes,
            )
        });
        let vms = vms.iter().map(|vm| {
            let VmProcess { id, command, .. } = vm.process();
            let labels = format!("{{process=\"{id}\",command=\"{}\"}}", escaped(command));
            (labels, vm.faults(), vm.progress().done)
        });
        let labeled = Labeled {
            socket: &self.socket,
            images: images.collect(),
            vms: vms.collect(),
        };
        let mut file = tempfile::NamedTempFile::new_in(dir)?;
        file.write_all(text(metrics, &labeled).as_bytes())?;
        // They contain no bytes of a guest.
        let permissions = Permissions::from_mode(0o644);
        file.as_file().set_permissions(permissions)?;
        file.persist(&self.path).map_err(|error| error.error)?;
        Ok(())
    }
}

/// Metrics with labels of their own.
#[derive(Debug, Default)]
struct Labeled<'s> {
    socket: &'s str,
    /// The labels of each image, and its bytes.
    images: Vec<(String, u64)>,
    /// The labels of each VM that is served, its faults and its filled bytes.
    vms: Vec<(String, u64, u64)>,
}

/// Returns a text as the value of a label.
fn escaped(text: &str) -> String {
    let mut escaped = String::new();
    for c in text.chars() {
        match c {
            '\\' | '"' => escaped.extend(['\\', c]),
            '\n' => escaped.push_str("\\n"),
            c => escaped.push(c),
        }
    }
    escaped
}

/// Returns metrics in the text format of Prometheus.
fn text(metrics: &ServerMetrics, labeled: &Labeled<'_>) -> String {
    let mut text = String::new();
    let mut add = |name: &str, kind: &str, help: &str, samples: &[(String, String)]| {
        let _ = writeln!(text, "# HELP ramsnap_serve_{name} {help}");
        let _ = writeln!(text, "# TYPE ramsnap_serve_{name} {kind}");
        for (suffix, value) in samples {
            let _ = writeln!(text, "ramsnap_serve_{name}{suffix} {value}");
        }
    };
    let info = [(
        format!("{{socket=\"{}\"}}", escaped(labeled.socket)),
        "1".to_owned(),
    )];
    add("info", "gauge", "The socket that VMMs connect to.", &info);
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
    let refused = plain(metrics.refused_clients);
    add(
        "refused_clients_total",
        "counter",
        "Clients that were not served at all.",
        &refused,
    );
    let images = labeled.images.iter().cloned();
    let images: Vec<_> = images
        .map(|(labels, bytes)| (labels, bytes.to_string()))
        .collect();
    add(
        "image_bytes_total",
        "counter",
        "Bytes that were read from each image for VMs.",
        &images,
    );
    let vms = |value: fn(&(String, u64, u64)) -> u64| -> Vec<_> {
        let all = labeled.vms.iter();
        all.map(|vm| (vm.0.clone(), value(vm).to_string()))
            .collect()
    };
    let help = "Page faults of each VM that is being served.";
    add("vm_faults", "gauge", help, &vms(|vm| vm.1));
    let help = "Bytes of the images that are in the RAM of each VM that is being served.";
    add("vm_filled_bytes", "gauge", help, &vms(|vm| vm.2));
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
        let labeled = Labeled {
            socket: "a\"b",
            images: vec![("{image=\"x\",layer=\"0\"}".into(), 5)],
            vms: vec![("{process=\"7\",command=\"y\"}".into(), 2, 3)],
        };
        let text = text(&ServerMetrics::default(), &labeled);
        let families = text.lines().filter(|line| line.starts_with("# TYPE"));
        assert_eq!(families.count(), 12);
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let (name, value) = line.rsplit_once(' ').unwrap();
            assert!(name.starts_with("ramsnap_serve_"), "{line}");
            value.parse::<f64>().unwrap();
        }
        for part in [
            "ramsnap_serve_filled_bytes_total{source=\"prefetch\"} 0",
            "ramsnap_serve_fault_seconds_bucket{le=\"+Inf\"} 0",
            "ramsnap_serve_fault_seconds_sum 0",
            "ramsnap_serve_refused_clients_total 0",
            "ramsnap_serve_info{socket=\"a\\\"b\"} 1",
            "ramsnap_serve_image_bytes_total{image=\"x\",layer=\"0\"} 5",
            "ramsnap_serve_vm_faults{process=\"7\",command=\"y\"} 2",
            "ramsnap_serve_vm_filled_bytes{process=\"7\",command=\"y\"} 3",
        ] {
            assert!(text.contains(part), "{part}");
        }
    }
}
