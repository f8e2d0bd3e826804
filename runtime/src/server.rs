//! The life of a runtime process: model, tokenizer, backend, engine, API, and the way down again.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{oneshot, watch};
use tracing::info;

use crate::adaskip::CALIBRATION_TEXT;
use crate::backend::cpu::{CpuBackend, CpuBackendError, CpuOptions, numerics_tag};
use crate::cache_client::{Fingerprint, RootKey};
use crate::config::Config;
use crate::engine::{self, EngineConfig, EngineHandle, StartError};
use crate::http::conversations::Conversations;
use crate::http::metrics::{self, Metrics};
use crate::http::{self, Server, Service, Submit};
use crate::model::fingerprint;
use crate::request::Command;
use crate::shared_prefix::SharedPrefixes;
use crate::text::TextError;
use crate::text::declared;
use crate::text::metadata::TextMetadata;
use crate::text::template::ChatTemplate;
use crate::text::tokenizer::{Specials, Tokenizer};
use crate::weights::gguf::{Model, ModelFileError};

/// Threads for http; the compute threads are the backend's own.
const HTTP_THREADS: usize = 2;
/// Threads that tokenise prompts; more would take the compute's cores.
const BLOCKING_THREADS: usize = 4;
/// How long running replies may go on after SIGTERM. Kubernetes gives a pod 30 seconds by default, of
/// which the daemon, told after us, needs some to write its tails.
const DRAIN_LIMIT: Duration = Duration::from_secs(20);

/// Why the process ends other than by SIGTERM; [`RunError::exit_code`] tells them apart.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// Settings that the model or the machine does not allow.
    #[error("{0}")]
    Config(String),
    /// The address cannot be had.
    #[error("cannot listen on {address}: {error}; choose another --http")]
    Listen {
        /// As configured.
        address: std::net::SocketAddr,
        /// The system's reason.
        error: io::Error,
    },
    /// The model's file.
    #[error(transparent)]
    Model(#[from] ModelFileError),
    /// The model's file, its text part.
    #[error("model file {path}: {error}")]
    Text {
        /// Where it is.
        path: std::path::PathBuf,
        /// What is wrong.
        error: TextError,
    },
    /// A bug, or a machine without threads.
    #[error("{0}")]
    Bug(String),
}

impl RunError {
    /// 64 for settings, 65 for the model's file, 70 for bugs (BSD's `sysexits.h`).
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Config(_) | Self::Listen { .. } => 64,
            Self::Model(_) | Self::Text { .. } => 65,
            Self::Bug(_) => 70,
        }
    }
}

impl From<CpuBackendError> for RunError {
    fn from(error: CpuBackendError) -> Self {
        match error {
            CpuBackendError::Thread(_) => Self::Bug(error.to_string()),
            _ => Self::Config(error.to_string()),
        }
    }
}

impl From<StartError> for RunError {
    fn from(error: StartError) -> Self {
        match error {
            StartError::Config(_) => Self::Config(error.to_string()),
            _ => Self::Bug(error.to_string()),
        }
    }
}

/// Runs until SIGTERM (or SIGINT), or until something breaks.
pub fn run(config: Config) -> Result<(), RunError> {
    let http = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(HTTP_THREADS)
        .max_blocking_threads(BLOCKING_THREADS)
        .enable_all()
        .thread_name("http")
        .build()
        .map_err(|error| RunError::Bug(format!("no threads for http: {error}")))?;
    let ended = http.block_on(serve(config));
    // A model may still be loading on a blocking thread; nothing waits for it.
    http.shutdown_background();
    ended
}

async fn serve(config: Config) -> Result<(), RunError> {
    let mut terminate = stop_signal().map_err(|error| RunError::Bug(error.to_string()))?;
    let address = config.http;
    let listener =
        TcpListener::bind(address).await.map_err(|error| RunError::Listen { address, error })?;
    let address = listener.local_addr().unwrap_or(address);
    info!(%address, "listening; requests are answered 503 until the model is loaded");
    let server = Arc::new(Server::default());
    let (stop, mut stopped) = watch::channel(false);
    let stopping = async move {
        let _ = stopped.wait_for(|stop| *stop).await;
    };
    let mut api = tokio::spawn(http::serve(listener, server.clone(), stopping));

    let loading = tokio::task::spawn_blocking(move || load(&config));
    let loaded = tokio::select! {
        loaded = loading => loaded.map_err(|error| RunError::Bug(format!("loading: {error}")))??,
        () = terminate.arrived() => {
            info!("told to stop while loading");
            return Ok(());
        }
    };
    let Loaded { service, engine, mut engine_ended } = loaded;
    let name = service.model_name.clone();
    server.open(service);
    info!(model = name, %address, "ready");

    tokio::select! {
        () = terminate.arrived() => info!("told to stop: finishing what runs"),
        end = &mut engine_ended => return Err(engine_bug(end)),
        end = &mut api => return Err(RunError::Bug(format!("http ended: {end:?}"))),
    }
    server.stop();
    let _ = stop.send(true);
    if tokio::time::timeout(DRAIN_LIMIT, &mut api).await.is_err() {
        info!(limit = ?DRAIN_LIMIT, "replies still run; they are cut off");
        api.abort();
    }
    if engine.submit(Command::Shutdown).is_err() {
        return Err(RunError::Bug("the engine is gone".to_owned()));
    }
    match engine_ended.await {
        Ok(Ok(())) => {
            info!("stopped");
            Ok(())
        }
        end => Err(engine_bug(end)),
    }
}

type EngineEnd = Result<Result<(), String>, oneshot::error::RecvError>;

fn engine_bug(end: EngineEnd) -> RunError {
    RunError::Bug(match end {
        Ok(Err(panic)) => format!("the engine panicked: {panic}"),
        _ => "the engine ended without being told to".to_owned(),
    })
}

/// SIGTERM, as Kubernetes sends it, and SIGINT, as a terminal does.
struct StopSignal {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

fn stop_signal() -> io::Result<StopSignal> {
    Ok(StopSignal {
        terminate: signal(SignalKind::terminate())?,
        interrupt: signal(SignalKind::interrupt())?,
    })
}

impl StopSignal {
    async fn arrived(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// Everything that came out of loading.
struct Loaded {
    service: Service,
    engine: EngineHandle,
    engine_ended: oneshot::Receiver<Result<(), String>>,
}

fn load(config: &Config) -> Result<Loaded, RunError> {
    let started = std::time::Instant::now();
    info!(path = %config.model.display(), "loading the model");
    let model = Model::open(&config.model)?;
    let (tokenizer, template) = read_text(&model)?;
    let sizes = model.config();
    let context_max = context_max(config, sizes.context_max)?;
    let model_name = config.served_name.clone().unwrap_or_else(|| {
        model
            .path()
            .file_stem()
            .map_or_else(String::new, |stem| stem.to_string_lossy().into_owned())
    });
    info!(
        model = model_name,
        layers = sizes.layers,
        vocabulary = sizes.vocab,
        context_max,
        threads = config.threads,
        "packing the weights"
    );
    let bug = |error: prometheus::Error| RunError::Bug(format!("metrics: {error}"));
    let registry = metrics::registry(&model_name).map_err(bug)?;
    let metrics = Metrics::new(&registry).map_err(bug)?;
    let doorbell = crate::cache_client::Doorbell::new();
    let waker = doorbell.waker();
    let backend = CpuBackend::new(
        &model,
        CpuOptions {
            threads: config.threads.get(),
            device_bytes: config.device_bytes,
            tokens_per_block: config.tokens_per_block,
        },
        Arc::new(move || waker.ring()),
    )?;
    let fingerprint = fingerprint(&model, config.tokens_per_block);
    if !config.skip.is_off() {
        info!(
            prefill = config.skip.prefill_sublayers,
            decode = config.skip.decode_sublayers,
            "learning which sublayers AdaSkip skips"
        );
    }
    let shared_prefixes = shared_prefixes(config, fingerprint, &tokenizer, template.as_ref())?;
    let end_tokens: Arc<[u32]> = tokenizer.end_of_turn().into();
    let (engine, thread) = engine::start(
        EngineConfig {
            context_max,
            vocabulary: tokenizer.vocabulary_size() as u32,
            end_tokens: end_tokens.clone(),
            sequences_max: config.sequences_max,
            step_tokens_max: config.step_tokens_max,
            waiting_max: config.waiting_max,
            skip: config.skip,
            calibration: tokenizer.encode(CALIBRATION_TEXT, Specials::Text),
            fingerprint,
            numerics_tag: numerics_tag(),
            shared_prefixes: shared_prefixes.clone(),
            cache_socket: config.cache_socket.clone(),
        },
        Box::new(backend),
        doorbell,
        &registry,
    )?;
    let engine_ended = watch_engine(thread)?;
    info!(seconds = started.elapsed().as_secs_f32(), "loaded");
    let submit: Submit = Arc::new({
        let engine = engine.clone();
        move |command| engine.submit(command)
    });
    let service = Service {
        conversations: Conversations::new(
            fingerprint,
            config.tokens_per_block,
            shared_prefixes,
            tokenizer.vocabulary_size(),
            engine.changes().clone(),
            submit.clone(),
            metrics.clone(),
        ),
        tokens_capacity: engine.tokens_capacity(),
        cache_attached: engine.stats().cache_attached.clone(),
        created: http::unix_seconds(),
        stop_tokens: end_tokens,
        admin: config.admin,
        model_name,
        context_max,
        tokenizer,
        template,
        submit,
        metrics,
    };
    Ok(Loaded { service, engine, engine_ended })
}

/// What the model's file says about text.
fn read_text(model: &Model) -> Result<(Tokenizer, Option<ChatTemplate>), RunError> {
    let in_file = |error| RunError::Text { path: model.path().to_owned(), error };
    let text = TextMetadata::from_gguf(model.metadata()).map_err(in_file)?;
    let tokenizer = Tokenizer::new(&text).map_err(in_file)?;
    let rows = model.config().vocab;
    if tokenizer.vocabulary_size() > rows {
        return Err(in_file(TextError::Vocabulary(format!(
            "{} tokens, but the weights have rows for {rows}",
            tokenizer.vocabulary_size(),
        ))));
    }
    let template = text
        .chat_template
        .as_deref()
        .map(|source| ChatTemplate::new(source, tokenizer.bos_text(), tokenizer.eos_text()))
        .transpose()
        .map_err(in_file)?;
    Ok((tokenizer, template))
}

/// Token ids of the prompts that the operator declared as shared.
fn shared_prefixes(
    config: &Config,
    fingerprint: [u8; 32],
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
) -> Result<SharedPrefixes, RunError> {
    let mut prompts = Vec::new();
    for system in &config.shared_prefixes {
        let ids = declared::token_ids(tokenizer, template, system).map_err(|error| {
            RunError::Config(format!("--shared-prefix: the model's template refuses it: {error}"))
        })?;
        info!(tokens = ids.last().map_or(0, Vec::len), "a prompt is shared by all tenants");
        prompts.extend(ids);
    }
    let public = RootKey::new(&Fingerprint(fingerprint), b"");
    Ok(SharedPrefixes::new(public, prompts, config.tokens_per_block.into()))
}

fn context_max(config: &Config, model: usize) -> Result<u32, RunError> {
    let model = u32::try_from(model).unwrap_or(u32::MAX);
    match config.context_max {
        None => Ok(model),
        Some(asked) if asked.get() <= model => Ok(asked.get()),
        Some(asked) => Err(RunError::Config(format!(
            "--context-max is {asked}; the model was trained for {model} tokens"
        ))),
    }
}

/// Tells when the engine's thread ends, and whether it panicked.
fn watch_engine(thread: JoinHandle<()>) -> Result<oneshot::Receiver<Result<(), String>>, RunError> {
    let (ended, engine_ended) = oneshot::channel();
    std::thread::Builder::new()
        .name("engine-watch".to_owned())
        .spawn(move || {
            let end = thread.join().map_err(|panic| panic_text(&*panic));
            let _ = ended.send(end); // Nobody asks when the process ends first.
        })
        .map_err(|error| RunError::Bug(format!("no thread to watch the engine: {error}")))?;
    Ok(engine_ended)
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message").to_owned()
}
