//! `kvctl verify`: a walk through all stored blocks.

use std::time::Duration;

use hyper::Method;
use serde_json::Value;

use crate::client::Client;
use crate::table::{bar, bytes, count, number, print_json, text};

/// Between two looks at how far it is.
const LOOK_EVERY: Duration = Duration::from_millis(500);

#[derive(Debug, clap::Args)]
pub struct Verify {
    /// Begin, and do not wait for the end; `kvctl verify` later shows how far it is.
    #[arg(long)]
    no_wait: bool,
}

impl Verify {
    pub fn run(&self, client: &Client, as_json: bool) -> anyhow::Result<()> {
        let mut state = client.send(Method::POST, "/verify", None)?;
        let is_terminal = std::io::IsTerminal::is_terminal(&std::io::stderr());
        while !self.no_wait && text(&state, "/state") == "running" {
            if is_terminal {
                let (done, all) = (number(&state, "/places_done"), number(&state, "/places"));
                eprint!("\r{}  {} checked ", bar(done, all), count(number(&state, "/blocks")));
            }
            std::thread::sleep(LOOK_EVERY);
            state = client.get("/verify")?;
        }
        if is_terminal {
            eprintln!();
        }
        if as_json {
            print_json(&state)?;
        } else {
            print!("{}", told(&state));
        }
        let bad = number(&state, "/bad");
        anyhow::ensure!(bad == 0, "{bad} blocks were not what was stored; they are forgotten");
        Ok(())
    }
}

fn told(state: &Value) -> String {
    let n = |pointer: &str| number(state, pointer);
    let mut lines = vec![format!(
        "{}: {} blocks checked, {}; {} bad, {} not read, {} of another geometry passed over",
        text(state, "/state"),
        count(n("/blocks")),
        bytes(n("/bytes")),
        count(n("/bad")),
        count(n("/unread")),
        count(n("/other_geometry")),
    )];
    for named in state["named"].as_array().into_iter().flatten() {
        lines.push(format!("  {}  {}", text(named, "/key"), text(named, "/reason")));
    }
    lines.join("\n") + "\n"
}
