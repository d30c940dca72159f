package pods

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/yaml"

	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

const (
	// staticEvery is how often the folder of static pods is looked at: one readdir.
	staticEvery = 2 * time.Second
	// maxManifest bounds a manifest's file.
	maxManifest = 1 << 20

	annotationSource = "kubernetes.io/config.source"
	annotationHash   = "kubernetes.io/config.hash"
	sourceFile       = "file"
)

// manifests is the folder of static pods.
type manifests struct {
	e     *Engine
	files map[string]manifest // by path
}

// manifest is one file as it was read last.
type manifest struct {
	size    int64
	changed time.Time
	key     string // of its pod; empty where it has none
	uid     types.UID
}

// scan looks at the folder and takes over what changed. A file that cannot be read
// or understood is told of once, and the pod that it described before goes on.
func (m *manifests) scan() {
	entries, err := os.ReadDir(m.e.cfg.StaticPods)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		m.e.log.Warn("static pods cannot be read, trying again", "folder", m.e.cfg.StaticPods, "error", err)
		return
	}
	m.e.staticRead.Store(true)
	present := map[string]bool{}
	for _, d := range entries {
		name := d.Name()
		if d.IsDir() || strings.HasPrefix(name, ".") {
			continue
		}
		switch filepath.Ext(name) {
		case ".yaml", ".yml", ".json", "":
		default:
			continue
		}
		path := filepath.Join(m.e.cfg.StaticPods, name)
		st, err := os.Stat(path)
		if err != nil {
			continue // gone again
		}
		present[path] = true
		old, had := m.files[path]
		if had && old.size == st.Size() && old.changed.Equal(st.ModTime()) && (old.uid == "" || m.e.lookup(old.uid) != nil) {
			continue // else its pod was ended before the file came back
		}
		now := manifest{size: st.Size(), changed: st.ModTime(), key: old.key, uid: old.uid}
		if pod, err := readManifest(path, st.Size(), m.e.cfg.Node); err != nil {
			m.e.log.Error("static pod ignored", "file", path, "error", err)
			m.e.metrics.badPods.Inc()
		} else {
			m.take(&now, path, pod)
		}
		m.files[path] = now
	}
	gone := false
	for path, old := range m.files {
		if present[path] {
			continue
		}
		delete(m.files, path)
		m.drop(old)
		gone = true
	}
	for path, f := range m.files {
		if gone && f.uid == "" {
			delete(m.files, path) // it may have been ignored because of the one that is gone
		}
	}
}

func (m *manifests) drop(old manifest) {
	if p := m.e.lookup(old.uid); p != nil {
		m.e.drop(old.key, p)
	}
}

// take runs the pod of a file in the place of the one before.
func (m *manifests) take(now *manifest, path string, pod *corev1.Pod) {
	key := pod.Namespace + "/" + pod.Name
	for other, o := range m.files {
		if other != path && o.key == key {
			m.e.log.Error("static pod ignored: another file describes a pod of that name", "file", path, "other", other, "pod", key)
			return
		}
	}
	if now.uid != "" && now.uid != pod.UID {
		m.drop(*now)
	}
	now.key, now.uid = key, pod.UID
	m.e.put(key, pod, payload.Pod{Rev: now.changed.UnixMilli()}, true)
}

// readManifest reads one pod. Its UID is made of what it says and where, so that
// it is the same pod after a restart and another one after a change.
func readManifest(path string, size int64, node string) (*corev1.Pod, error) {
	if size > maxManifest {
		return nil, fmt.Errorf("%d bytes: want at most %d", size, maxManifest)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	p := &corev1.Pod{}
	if err := yaml.UnmarshalStrict(b, p); err != nil {
		return nil, fmt.Errorf("want one Pod as YAML or JSON: %w", err)
	}
	switch {
	case p.Kind != "Pod" || p.APIVersion != "v1":
		return nil, fmt.Errorf("%s %s: want apiVersion v1 and kind Pod", p.APIVersion, p.Kind)
	case p.Name == "" || len(p.Spec.Containers) == 0:
		return nil, errors.New("want metadata.name and at least one container")
	}
	if p.Namespace == "" {
		p.Namespace = corev1.NamespaceDefault
	}
	p.Name += "-" + node
	if err := errors.Join(topic.CheckName("namespace", p.Namespace), topic.CheckName("pod", p.Name)); err != nil {
		return nil, err
	}
	if p.UID == "" {
		sum := sha256.New()
		fmt.Fprintf(sum, "%s\x00%s\x00", node, path)
		sum.Write(b)
		h := hex.EncodeToString(sum.Sum(nil)[:16])
		p.UID = types.UID(h)
	}
	if p.Annotations == nil {
		p.Annotations = map[string]string{}
	}
	p.Annotations[annotationSource] = sourceFile
	p.Annotations[annotationHash] = string(p.UID)
	p.Spec.NodeName = node
	defaults(p)
	p.Spec.Tolerations = append(p.Spec.Tolerations, corev1.Toleration{Operator: corev1.TolerationOpExists, Effect: corev1.TaintEffectNoExecute})
	p.Status = corev1.PodStatus{}
	return p, nil
}

// defaults fills in what the API server would have.
func defaults(p *corev1.Pod) {
	s := &p.Spec
	set(&s.RestartPolicy, corev1.RestartPolicyAlways)
	set(&s.DNSPolicy, corev1.DNSClusterFirst)
	if s.TerminationGracePeriodSeconds == nil {
		g := int64(corev1.DefaultTerminationGracePeriodSeconds)
		s.TerminationGracePeriodSeconds = &g
	}
	if s.EnableServiceLinks == nil {
		yes := true
		s.EnableServiceLinks = &yes
	}
	if s.SecurityContext == nil {
		s.SecurityContext = &corev1.PodSecurityContext{}
	}
	for c := range containersOf(p) {
		set(&c.TerminationMessagePath, corev1.TerminationMessagePathDefault)
		set(&c.TerminationMessagePolicy, corev1.TerminationMessageReadFile)
		if c.ImagePullPolicy == "" {
			c.ImagePullPolicy = corev1.PullIfNotPresent
			if i := strings.LastIndexByte(c.Image, '/'); !strings.Contains(c.Image, "@") &&
				(!strings.Contains(c.Image[i+1:], ":") || strings.HasSuffix(c.Image, ":latest")) {
				c.ImagePullPolicy = corev1.PullAlways
			}
		}
		for i := range c.Ports {
			set(&c.Ports[i].Protocol, corev1.ProtocolTCP)
			if s.HostNetwork && c.Ports[i].HostPort == 0 {
				c.Ports[i].HostPort = c.Ports[i].ContainerPort
			}
		}
		for _, pr := range []*corev1.Probe{c.LivenessProbe, c.ReadinessProbe, c.StartupProbe} {
			if pr == nil {
				continue
			}
			set(&pr.TimeoutSeconds, 1)
			set(&pr.PeriodSeconds, 10)
			set(&pr.SuccessThreshold, 1)
			set(&pr.FailureThreshold, 3)
			if pr.HTTPGet != nil {
				set(&pr.HTTPGet.Path, "/")
				set(&pr.HTTPGet.Scheme, corev1.URISchemeHTTP)
			}
		}
		if c.Resources.Limits != nil && c.Resources.Requests == nil {
			c.Resources.Requests = corev1.ResourceList{}
		}
		for name, q := range c.Resources.Limits {
			if _, ok := c.Resources.Requests[name]; !ok {
				c.Resources.Requests[name] = q
			}
		}
	}
	mode, path := corev1.ConfigMapVolumeSourceDefaultMode, corev1.HostPathUnset
	for i := range s.Volumes {
		v := &s.Volumes[i].VolumeSource
		switch {
		case v.ConfigMap != nil && v.ConfigMap.DefaultMode == nil:
			v.ConfigMap.DefaultMode = &mode
		case v.Secret != nil && v.Secret.DefaultMode == nil:
			v.Secret.DefaultMode = &mode
		case v.Projected != nil && v.Projected.DefaultMode == nil:
			v.Projected.DefaultMode = &mode
		case v.DownwardAPI != nil && v.DownwardAPI.DefaultMode == nil:
			v.DownwardAPI.DefaultMode = &mode
		case v.HostPath != nil && v.HostPath.Type == nil:
			v.HostPath.Type = &path
		}
	}
}

// set gives a field its value where it has none.
func set[T comparable](field *T, value T) {
	var zero T
	if *field == zero {
		*field = value
	}
}
