//! Lines that say what happens, with the seconds since the start: something is seen to move all the time.

use std::time::{Duration, Instant};

/// The clock of one run, and the line that was said last.
#[derive(Debug)]
pub struct Progress {
    began: Instant,
    last: String,
}

impl Default for Progress {
    fn default() -> Self {
        Self { began: Instant::now(), last: String::new() }
    }
}

impl Progress {
    /// Begins to count.
    pub fn begin() -> Self {
        Self::default()
    }

    /// Says a line.
    pub fn say(&mut self, line: impl AsRef<str>) {
        println!("[{:4} s] {}", self.began.elapsed().as_secs(), line.as_ref());
        line.as_ref().clone_into(&mut self.last);
    }

    /// Says a line unless it was the last one said: for what is looked at again and again.
    pub fn say_news(&mut self, line: impl AsRef<str>) {
        if self.last != line.as_ref() {
            self.say(line);
        }
    }

    /// Since the beginning.
    pub fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }
}
