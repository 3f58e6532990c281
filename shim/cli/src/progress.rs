//! Progress: a bar on a terminal, a line now and then elsewhere.

use std::io::IsTerminal;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::units::bytes;

const ON_TERMINAL: Duration = Duration::from_millis(100);
const ELSEWHERE: Duration = Duration::from_secs(10);
const BAR: &str = "{msg} {bar:30} {decimal_bytes}/{decimal_total_bytes} {decimal_bytes_per_sec} {eta}";

/// A reading of the progress.
#[derive(Clone, Debug, Default)]
pub(crate) struct Reading {
    /// Finished bytes.
    pub(crate) done: u64,
    /// All bytes; 0 while unknown.
    pub(crate) total: u64,
    /// An error before a retry, if not shown yet.
    pub(crate) trouble: Option<String>,
}

/// A display of readings, until dropped.
pub(crate) struct Shown {
    stop: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Shown {
    /// Shows the readings of `read` on standard error, under the title `what`; nothing if `quiet`.
    pub(crate) fn begin(what: String, quiet: bool, read: impl Fn() -> Reading + Send + 'static) -> Self {
        let (stop, stopped) = mpsc::channel();
        let thread = (!quiet).then(|| {
            let terminal = std::io::stderr().is_terminal();
            std::thread::spawn(move || if terminal { bar(what, &stopped, read) } else { lines(&what, &stopped, read) })
        });
        Self { stop: Some(stop), thread }
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn bar(what: String, stopped: &mpsc::Receiver<()>, read: impl Fn() -> Reading) {
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    // The default is never used: a test checks the template.
    bar.set_style(ProgressStyle::with_template(BAR).unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.set_message(what);
    while let Err(RecvTimeoutError::Timeout) = stopped.recv_timeout(ON_TERMINAL) {
        let reading = read();
        if let Some(trouble) = reading.trouble {
            bar.println(format!("trying again: {trouble}"));
        }
        if reading.total > 0 {
            bar.set_length(reading.total);
            bar.set_position(reading.done);
        }
    }
    bar.finish_and_clear();
}

fn lines(what: &str, stopped: &mpsc::Receiver<()>, read: impl Fn() -> Reading) {
    let mut before = (Instant::now(), 0);
    while let Err(RecvTimeoutError::Timeout) = stopped.recv_timeout(ELSEWHERE) {
        let reading = read();
        if let Some(trouble) = reading.trouble {
            eprintln!("trying again: {trouble}");
        }
        let (elapsed, more) = (before.0.elapsed(), reading.done.saturating_sub(before.1));
        eprintln!("{what}: {} of {}, {}", bytes(reading.done), bytes(reading.total), rate(more, elapsed));
        before = (Instant::now(), reading.done);
    }
}

/// Bytes per second, as text.
pub(crate) fn rate(moved: u64, elapsed: Duration) -> String {
    let milliseconds = elapsed.as_millis().max(1);
    let per_second = u128::from(moved) * 1000 / milliseconds;
    format!("{}/s", bytes(u64::try_from(per_second).unwrap_or(u64::MAX)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bar_has_a_template_that_is_understood() {
        ProgressStyle::with_template(BAR).unwrap();
    }

    #[test]
    fn a_rate_is_of_a_second() {
        assert_eq!(rate(3_000_000_000, Duration::from_millis(1500)), "2.0 GB/s");
        assert_eq!(rate(1000, Duration::ZERO), "1.0 MB/s");
    }
}
