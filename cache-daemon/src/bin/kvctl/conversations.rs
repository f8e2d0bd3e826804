//! `kvctl show`, `fork`, `truncate`, `delete`.

use hyper::Method;
use serde_json::{Value, json};

use crate::client::{Client, encoded};
use crate::table::{bytes, count, number, print_json, text, when};

/// A conversation as people name it.
#[derive(Debug, Clone, clap::Args)]
pub struct Which {
    /// The client's name for it; with --id the first digits of its id.
    conversation: String,
    /// `CONVERSATION` is an id.
    #[arg(long)]
    id: bool,
    /// First digits of the root (model and tenant), where several have a conversation of that name.
    #[arg(long, conflicts_with = "id")]
    root: Option<String>,
}

impl Which {
    /// Of the admin API.
    pub fn path(&self, action: &str) -> String {
        let query = match (&self.root, self.id) {
            (_, true) => "?by=id".to_owned(),
            (Some(root), _) => format!("?root={}", encoded(root)),
            _ => String::new(),
        };
        format!("/conversations/{}{action}{query}", encoded(&self.conversation))
    }

    pub fn show(&self, client: &Client, as_json: bool) -> anyhow::Result<()> {
        let found = client.get(&self.path(""))?;
        if as_json {
            return print_json(&found);
        }
        print!("{}", facts(&found));
        Ok(())
    }
}

/// What is known of a conversation, a line each.
pub fn facts(found: &Value) -> String {
    let line = &found["conversation"];
    let n = |pointer: &str| number(line, pointer);
    let tier = |tier: &str| {
        let at = |what: &str| n(&format!("/{tier}/{what}"));
        format!("{} blocks, {}", count(at("blocks")), bytes(at("bytes")))
    };
    let mut lines = vec![
        format!("conversation  {:?}", text(line, "/name")),
        format!("id            {}", text(line, "/id")),
        format!("root          {} (model and tenant)", text(line, "/root")),
        format!("history       {} tokens, {} blocks", count(n("/tokens")), count(n("/blocks"))),
    ];
    if n("/dropped_tokens") > 0 {
        lines.push(format!("truncated     {} tokens dropped so far", count(n("/dropped_tokens"))));
    }
    lines.push(format!("host          {}", tier("host")));
    lines.push(format!("disk          {}", tier("disk")));
    lines.push(format!("last turn     {}", when(n("/used_ms"))));
    if line["expires_ms"].is_u64() {
        lines.push(format!("expires       {}, if not used", when(n("/expires_ms"))));
    }
    if line["pinned_until_ms"].is_u64() {
        lines.push(format!("pinned        ends {}", when(n("/pinned_until_ms"))));
    }
    lines.push(format!("next turn     finds {} tokens", count(number(found, "/tokens_found"))));
    lines.join("\n") + "\n"
}

#[derive(Debug, clap::Args)]
pub struct Fork {
    #[command(flatten)]
    which: Which,
    /// Name of the copy.
    new_name: String,
}

impl Fork {
    pub fn run(&self, client: &Client, as_json: bool) -> anyhow::Result<()> {
        let body = json!({ "name": self.new_name });
        let made = client.send(Method::POST, &self.which.path("/fork"), Some(&body))?;
        if as_json {
            return print_json(&made);
        }
        print!("{}", facts(&made));
        Ok(())
    }
}

#[derive(Debug, clap::Args)]
pub struct Truncate {
    #[command(flatten)]
    which: Which,
    /// Blocks to drop.
    #[arg(long, value_name = "BLOCKS")]
    drop: u32,
    /// Blocks to keep at the start, before those dropped.
    #[arg(long, value_name = "BLOCKS", default_value_t = 0)]
    sinks: u32,
}

impl Truncate {
    pub fn run(&self, client: &Client, as_json: bool) -> anyhow::Result<()> {
        let body = json!({ "sinks": self.sinks, "drop": self.drop });
        let changed = client.send(Method::POST, &self.which.path("/truncate"), Some(&body))?;
        if as_json {
            return print_json(&changed);
        }
        print!("{}", facts(&changed));
        Ok(())
    }
}

#[derive(Debug, clap::Args)]
pub struct Delete {
    #[command(flatten)]
    which: Which,
}

impl Delete {
    pub fn run(&self, client: &Client, as_json: bool) -> anyhow::Result<()> {
        let deleted = client.send(Method::DELETE, &self.which.path(""), None)?;
        if as_json {
            return print_json(&deleted);
        }
        println!(
            "deleted: {} blocks and the record are unreadable, {} blocks stay for conversations that share them",
            count(number(&deleted, "/blocks")),
            count(number(&deleted, "/blocks_shared")),
        );
        match deleted["erased_by_ms"].as_u64() {
            Some(at) => println!("the disk tier erases them, {} at the latest", when(at)),
            None => println!("there is no disk tier: nothing is left of them"),
        }
        Ok(())
    }
}
