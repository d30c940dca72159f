package image

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	utilerrors "k8s.io/apimachinery/pkg/util/errors"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// The reasons of an Error, which are those of a waiting container.
const (
	ErrImagePull              = "ErrImagePull"
	ImagePullBackOff          = "ImagePullBackOff"
	ErrImageNeverPull         = "ErrImageNeverPull"
	InvalidImageName          = "InvalidImageName"
	ImageInspectError         = "ImageInspectError"
	RegistryUnavailable       = "RegistryUnavailable"
	SignatureValidationFailed = "SignatureValidationFailed"
)

// Error is why a container has no image, for the status of the container.
type Error struct {
	Reason, Message string
	// Until is when to try again at the earliest; the zero time is now.
	Until time.Time
}

func (e *Error) Error() string { return e.Reason + ": " + e.Message }

// Runtime is what is needed of the container runtime.
type Runtime interface {
	// ImageStatus gives an image; nil if it is not there.
	ImageStatus(ctx context.Context, spec *runtimeapi.ImageSpec) (*runtimeapi.Image, error)
	PullImage(ctx context.Context, spec *runtimeapi.ImageSpec, auth *runtimeapi.AuthConfig, sandbox *runtimeapi.PodSandboxConfig) (ref string, err error)
	ListImages(ctx context.Context, filter *runtimeapi.ImageFilter) ([]*runtimeapi.Image, error)
	RemoveImage(ctx context.Context, spec *runtimeapi.ImageSpec) error
	ImageFsInfo(ctx context.Context) (*runtimeapi.ImageFsInfoResponse, error)
	ListContainers(ctx context.Context, filter *runtimeapi.ContainerFilter) ([]*runtimeapi.Container, error)
	Status(ctx context.Context, verbose bool) (*runtimeapi.StatusResponse, error)
}

// Config says how images are pulled and collected. Runtime must be set.
type Config struct {
	Runtime Runtime
	// Parallel is how many pulls run at once; the others wait in order. Default 1,
	// as the kubelet's.
	Parallel int
	// DockerConfig is the node's own Docker config.json, whose credentials serve
	// all pods; empty or missing is none. It is read at each pull.
	DockerConfig string
	// UsePresent makes a container with the policy Always start from the image
	// that is present while its registry cannot be reached, so that pods come back
	// without the network. The kubelet keeps them waiting.
	UsePresent bool
	// Fetching tells how many bytes have arrived of what all running pulls are
	// fetching now, for the events of long pulls; nil where nobody knows. See
	// [ContainerdFetching].
	Fetching func(context.Context) (int64, error)
	// Event is told what the kubelet would record about a container of a pod.
	Event func(pod *corev1.Pod, container *corev1.Container, typ, reason, message string)

	// Desired gives the images, as pods name them, that must not be collected.
	Desired func() []string
	// High and Low are percentages of the image file system: at High, images are
	// collected until Low is reached. Defaults 85 and 80; a High of 100 never
	// collects.
	High, Low int
	// MinAge spares images that were first seen since; default 2 min. All are
	// first seen when the agent starts.
	MinAge time.Duration
	// Stat gives the size and the free space in bytes of the file system at a
	// path. Default statfs.
	Stat func(path string) (capacity, available uint64, err error)
	// NodeEvent is told what the kubelet would record about the node.
	NodeEvent func(typ, reason, message string)

	Logger  *slog.Logger
	Metrics prometheus.Registerer // nil: none
	// Now is the clock, time.Now if nil.
	Now func() time.Time
}

// Images is the node's images. Its methods may be called from several goroutines.
type Images struct {
	cfg   Config
	log   *slog.Logger
	slots chan struct{} // one for each running pull

	mu struct {
		sync.Mutex
		backoffs map[backoffKey]*backoff
		access   map[string]map[string]*access // image ID → repository → who pulled it
		pulling  map[string]*intent            // by image name
		silent   map[string]time.Time          // registries that could not be reached, and when that is forgotten
	}
	collector     collector
	progressFirst time.Duration

	pulls     *prometheus.CounterVec
	waiting   prometheus.Gauge
	collected prometheus.Counter
}

// New makes the images.
func New(cfg Config) (*Images, error) {
	if cfg.Runtime == nil {
		return nil, errors.New("image: Config needs Runtime")
	}
	if cfg.Parallel == 0 {
		cfg.Parallel = 1
	}
	if cfg.High == 0 {
		cfg.High = 85
	}
	if cfg.Low == 0 {
		cfg.Low = min(80, cfg.High)
	}
	if cfg.Parallel < 0 || cfg.Low < 0 || cfg.Low > cfg.High || cfg.High > 100 {
		return nil, fmt.Errorf("image: there must be at least one pull at once, and 0 <= low <= high <= 100 percent, not %d and %d to %d", cfg.Parallel, cfg.Low, cfg.High)
	}
	if cfg.MinAge == 0 {
		cfg.MinAge = 2 * time.Minute
	}
	if cfg.Stat == nil {
		cfg.Stat = statfs
	}
	if cfg.Event == nil {
		cfg.Event = func(*corev1.Pod, *corev1.Container, string, string, string) {}
	}
	if cfg.NodeEvent == nil {
		cfg.NodeEvent = func(string, string, string) {}
	}
	if cfg.Desired == nil {
		cfg.Desired = func() []string { return nil }
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	m := &Images{cfg: cfg, log: cfg.Logger, slots: make(chan struct{}, cfg.Parallel), progressFirst: progressFirst,
		pulls: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "fairlead_pods_image_pulls_total", Help: "Image pulls by their result: ok, failed, or canceled because the pod went away."}, []string{"result"}),
		waiting: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "fairlead_pods_image_pulls_waiting", Help: "Image pulls that wait for another to end."}),
		collected: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "fairlead_pods_images_collected_total", Help: "Unused images that were removed to make room."}),
	}
	m.mu.backoffs = map[backoffKey]*backoff{}
	m.mu.access = map[string]map[string]*access{}
	m.mu.pulling = map[string]*intent{}
	m.mu.silent = map[string]time.Time{}
	m.collector.records = map[string]*record{}
	for _, result := range []string{"ok", "failed", "canceled"} {
		m.pulls.WithLabelValues(result)
	}
	if cfg.Metrics != nil {
		for _, c := range []prometheus.Collector{m.pulls, m.waiting, m.collected} {
			if err := cfg.Metrics.Register(c); err != nil {
				return nil, fmt.Errorf("image: register metrics: %w", err)
			}
		}
	}
	return m, nil
}

// request is one call of Ensure.
type request struct {
	pod       *corev1.Pod
	container *corev1.Container
	name      name
	spec      *runtimeapi.ImageSpec
	sandbox   *runtimeapi.PodSandboxConfig
	creds     []credential
}

// Ensure makes sure that the container's image is on the node and gives the
// reference by which the runtime knows it. It blocks while it pulls, or waits for
// other pulls, until ctx ends, whose error it returns then. Every other error is
// an *Error. What the kubelet's image manager would record has been told as
// events; the container's own, "Error: ErrImagePull", is the caller's.
//
// An image volume is asked for with a Container that has its Image and
// ImagePullPolicy.
func (m *Images) Ensure(ctx context.Context, pod *corev1.Pod, container *corev1.Container, secrets []*corev1.Secret, sandbox *runtimeapi.PodSandboxConfig) (string, error) {
	event := func(typ, reason, message string) { m.cfg.Event(pod, container, typ, reason, message) }
	n, err := parse(container.Image)
	if err != nil {
		msg := fmt.Sprintf("Failed to apply default image tag %q: %v", container.Image, err)
		event(corev1.EventTypeWarning, "InspectFailed", msg)
		return "", &Error{Reason: InvalidImageName, Message: msg}
	}
	r := &request{pod: pod, container: container, name: n, sandbox: sandbox,
		spec: &runtimeapi.ImageSpec{Image: n.tagged, Annotations: pod.Annotations}}
	// A secret that cannot be read stops a pull, not the use of a present image.
	creds, credsErr := credentials(m.cfg.DockerConfig, secrets, n.repository)
	r.creds = creds

	policy := container.ImagePullPolicy
	if policy == "" { // no API server has set the default
		if policy = corev1.PullIfNotPresent; n.latest {
			policy = corev1.PullAlways
		}
	}
	image, err := m.cfg.Runtime.ImageStatus(ctx, r.spec)
	if ctx.Err() != nil {
		return "", ctx.Err()
	}
	if policy != corev1.PullAlways {
		if err != nil {
			msg := fmt.Sprintf("Failed to inspect image %q: %v", container.Image, err)
			event(corev1.EventTypeWarning, "InspectFailed", msg)
			return "", &Error{Reason: ImageInspectError, Message: msg}
		}
		if image.GetId() != "" && m.mayUse(image.GetId(), r) {
			event(corev1.EventTypeNormal, "Pulled", fmt.Sprintf("Container image %q already present on machine and can be accessed by the pod", container.Image))
			return image.GetId(), nil
		}
		if policy == corev1.PullNever { // whether it is there is not told to those who may not use it
			msg := fmt.Sprintf("Container image %q is not present with pull policy of Never", container.Image)
			event(corev1.EventTypeWarning, "ErrImageNeverPull", msg)
			return "", &Error{Reason: ErrImageNeverPull, Message: msg}
		}
	}
	if credsErr != nil {
		event(corev1.EventTypeWarning, "Failed", fmt.Sprintf("Failed to pull image %q: %v", container.Image, credsErr))
		return "", &Error{Reason: ErrImagePull, Message: credsErr.Error()}
	}
	return m.pull(ctx, r, policy, image.GetId())
}

// pull pulls the image, unless it is in back-off. before is the ID of the image
// that is there.
func (m *Images) pull(ctx context.Context, r *request, policy corev1.PullPolicy, before string) (string, error) {
	event := func(typ, reason, message string) { m.cfg.Event(r.pod, r.container, typ, reason, message) }
	image := r.container.Image
	key := backoffKey{r.pod.UID, image}
	if until, last, wait := m.inBackoff(key); wait {
		msg := fmt.Sprintf("Back-off pulling image %q", image)
		event(corev1.EventTypeNormal, "BackOff", msg)
		return "", &Error{Reason: ImagePullBackOff, Message: msg + ": " + last, Until: until}
	}
	if policy == corev1.PullAlways {
		if ref, ok := m.present(ctx, r, "its registry could not be reached a moment ago"); ok {
			return ref, nil
		}
	}

	defer m.intend(image, before)()
	event(corev1.EventTypeNormal, "Pulling", fmt.Sprintf("Pulling image %q", image))
	began := time.Now() // not cfg.Now: a duration
	m.waiting.Inc()
	select {
	case m.slots <- struct{}{}:
		m.waiting.Dec()
	case <-ctx.Done():
		m.waiting.Dec()
		m.pulls.WithLabelValues("canceled").Inc()
		return "", ctx.Err()
	}
	if policy == corev1.PullAlways { // another one has found out meanwhile
		if ref, ok := m.present(ctx, r, "its registry could not be reached a moment ago"); ok {
			<-m.slots
			return ref, nil
		}
	}
	pullBegan := time.Now()
	pulling, pulled := context.WithCancel(ctx)
	var told sync.WaitGroup
	told.Go(func() { m.progress(pulling, r) })
	ref, used, err := m.pullWith(ctx, r)
	pulled()
	told.Wait()
	var size uint64
	if err == nil {
		// Best effort, as the kubelet's.
		if img, err := m.cfg.Runtime.ImageStatus(ctx, r.spec); err == nil {
			size = img.GetSize()
		}
	}
	ended := time.Now()
	<-m.slots
	switch {
	case err != nil && ctx.Err() != nil:
		m.pulls.WithLabelValues("canceled").Inc()
		return "", ctx.Err()
	case err != nil:
		m.pulls.WithLabelValues("failed").Inc()
		if policy == corev1.PullAlways && m.cfg.UsePresent && unreachable(err) {
			m.silence(r.name.registry)
			if ref, ok := m.present(ctx, r, err.Error()); ok {
				return ref, nil
			}
		}
		event(corev1.EventTypeWarning, "Failed", fmt.Sprintf("Failed to pull image %q: %v", image, err))
		e := pullError(image, err)
		e.Until = m.failed(key, e.Error())
		return "", e
	}
	m.pulls.WithLabelValues("ok").Inc()
	m.succeeded(key)
	m.allow(ref, r.name.repository, used)
	event(corev1.EventTypeNormal, "Pulled", fmt.Sprintf("Successfully pulled image %q in %v (%v including waiting). Image size: %v bytes.",
		image, ended.Sub(pullBegan).Truncate(time.Millisecond), ended.Sub(began).Truncate(time.Millisecond), size))
	return ref, nil
}

// pullWith tries the credentials one after the other, and without if there are
// none. It gives the one that worked.
func (m *Images) pullWith(ctx context.Context, r *request) (ref string, used *credential, err error) {
	if len(r.creds) == 0 {
		ref, err = m.cfg.Runtime.PullImage(ctx, r.spec, nil, r.sandbox)
		return ref, nil, err
	}
	var errs []error
	for i := range r.creds {
		c := &r.creds[i]
		ref, err := m.cfg.Runtime.PullImage(ctx, r.spec, &runtimeapi.AuthConfig{Username: c.username, Password: c.password}, r.sandbox)
		if err == nil {
			return ref, c, nil
		}
		if errs = append(errs, err); ctx.Err() != nil {
			break
		}
	}
	return "", nil, utilerrors.NewAggregate(errs)
}

// present gives the image that is there, for the policy Always while the
// registry cannot be reached.
func (m *Images) present(ctx context.Context, r *request, why string) (string, bool) {
	if !m.silenced(r.name.registry) { // none is, without UsePresent
		return "", false
	}
	image, err := m.cfg.Runtime.ImageStatus(ctx, r.spec)
	if err != nil || image.GetId() == "" || !m.mayUse(image.GetId(), r) {
		return "", false
	}
	m.cfg.Event(r.pod, r.container, corev1.EventTypeNormal, "Pulled",
		fmt.Sprintf("Container image %q already present on machine and used as it is: %s", r.container.Image, why))
	return image.GetId(), true
}

// silentFor is how long a registry that could not be reached is not asked again
// where the image is there: a dial may take half a minute to fail.
const silentFor = time.Minute

func (m *Images) silence(registry string) {
	now := m.cfg.Now()
	m.mu.Lock()
	defer m.mu.Unlock()
	for r, until := range m.mu.silent {
		if !now.Before(until) {
			delete(m.mu.silent, r)
		}
	}
	m.mu.silent[registry] = now.Add(silentFor)
}

func (m *Images) silenced(registry string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.cfg.Now().Before(m.mu.silent[registry])
}

// unreachable tells that nobody answered, by what containerd ("failed to do
// request") and CRI-O ("pinging container registry") say then.
func unreachable(err error) bool {
	s := err.Error()
	return strings.HasPrefix(s, RegistryUnavailable) || strings.Contains(s, "failed to do request: ") || strings.Contains(s, "pinging container registry ")
}

// pullError is the error of a pull as the kubelet shows it.
func pullError(image string, err error) *Error {
	for reason, what := range map[string]string{
		RegistryUnavailable:       "the registry is unavailable",
		SignatureValidationFailed: "the signature validation failed",
	} {
		if detail, ok := strings.CutPrefix(err.Error(), reason); ok {
			return &Error{Reason: reason, Message: fmt.Sprintf("image pull failed for %s because %s%s", image, what, detail)}
		}
	}
	return &Error{Reason: ErrImagePull, Message: err.Error()}
}

// Forget drops what is known about the pulls of a pod that is gone.
func (m *Images) Forget(uid types.UID) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for k := range m.mu.backoffs {
		if k.uid == uid {
			delete(m.mu.backoffs, k)
		}
	}
}
