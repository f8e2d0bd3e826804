//! `kvctl import`, `offload`.

use serde_json::{Value, json};

use crate::client::Client;
use crate::conversations::Which;
use crate::table::{bytes, count, number, print_json};

/// A conversation that is somewhere else.
#[derive(Debug, clap::Args)]
pub struct Import {
    /// The client's name for it; with --id its whole id, in 64 digits.
    conversation: String,
    /// Host and port of the other daemon's --migration-listen, or `remote` for the object store.
    #[arg(long, value_name = "ADDRESS")]
    from: String,
    /// `CONVERSATION` is an id.
    #[arg(long)]
    id: bool,
    /// Root (model and tenant), in 64 digits; by default this daemon's model without a tenant's salt.
    #[arg(long, conflicts_with = "id")]
    root: Option<String>,
}

impl Import {
    pub fn run(&self, client: &Client, as_json: bool) -> anyhow::Result<()> {
        let which = if self.id { "id" } else { "name" };
        let mut body = json!({ which: self.conversation, "from": self.from });
        if let Some(root) = &self.root {
            body["root"] = json!(root);
        }
        let done = client.lines("/imports", Some(&body), |line| {
            if !as_json {
                eprintln!("{}", progress(line));
            }
        })?;
        if as_json {
            return print_json(&done);
        }
        println!("{}", imported(&done));
        Ok(())
    }
}

fn progress(line: &Value) -> String {
    let n = |pointer: &str| number(line, pointer);
    format!("{} of {} blocks", count(n("/arrived")), count(n("/missing")))
}

fn imported(done: &Value) -> String {
    let n = |pointer: &str| number(done, pointer);
    let record = if done["record_kept"] == true { "its record" } else { "a newer record was here" };
    let gone = match n("/absent") {
        0 => String::new(),
        absent => format!("; {} were gone at the source", count(absent)),
    };
    format!(
        "imported {} blocks ({}) and {record}; {} of {} were here already{gone}",
        count(n("/arrived")),
        bytes(n("/bytes")),
        count(n("/blocks").saturating_sub(n("/missing"))),
        count(n("/blocks")),
    )
}

pub fn offload(which: &Which, client: &Client, as_json: bool) -> anyhow::Result<()> {
    let done = client.lines(&which.path("/offload"), None, |_| {})?;
    if as_json {
        return print_json(&done);
    }
    let n = |pointer: &str| number(&done, pointer);
    println!(
        "offloaded {} of {} blocks ({}); the others were there",
        count(n("/put")),
        count(n("/blocks")),
        bytes(n("/bytes")),
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_import_is_told_in_a_sentence() {
        let done = json!({
            "blocks": 70, "missing": 60, "arrived": 59, "absent": 1, "bytes": 1 << 20,
            "retries": 0, "record_kept": true, "done": true,
        });
        let told = imported(&done);
        assert!(told.starts_with("imported 59 blocks (1"), "{told}");
        assert!(told.contains("10 of 70 were here already"), "{told}");
        assert!(told.ends_with("1 were gone at the source"), "{told}");
        assert_eq!(progress(&done), "59 of 60 blocks");
    }
}
