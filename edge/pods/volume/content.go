package volume

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	utilerrors "k8s.io/apimachinery/pkg/util/errors"

	"github.com/fairlead-io/fairlead/edge/pods/source"
	"github.com/fairlead-io/fairlead/edge/pods/spec"
)

const (
	// tokenSeconds is the life of a token where the pod does not say.
	tokenSeconds = 3600
	// tokenRetry is how often a token that is due is looked for. News of one come
	// as an Update, so this is for what was missed.
	tokenRetry = 10 * time.Minute
)

// setUpContent makes a volume of files that come from the cluster.
func (v *Volumes) setUpContent(pod *corev1.Pod, vol *corev1.Volume) (due time.Time, err error) {
	dir := v.path(pod, vol)
	c := collector{v: v, pod: pod, dir: dir, files: payload{}}
	switch {
	case vol.ConfigMap != nil:
		s := vol.ConfigMap
		c.defaults(s.DefaultMode, s.DefaultUser)
		err = c.configMap(s.Name, s.Items, s.Optional)
	case vol.Secret != nil:
		s := vol.Secret
		c.defaults(s.DefaultMode, s.DefaultUser)
		err = c.secret(s.SecretName, s.Items, s.Optional)
	case vol.DownwardAPI != nil:
		s := vol.DownwardAPI
		c.defaults(s.DefaultMode, s.DefaultUser)
		err = c.downwardAPI(s.Items)
	case vol.Projected != nil:
		err = c.projected(vol.Projected)
	}
	if err != nil {
		return c.due, err
	}
	// Secrets are in memory only.
	medium := corev1.StorageMediumDefault
	if vol.Secret != nil || vol.Projected != nil {
		medium = corev1.StorageMediumMemory
	}
	group := fsGroup(pod)
	if err := v.makeDir(pod, dir, corev1.EmptyDirVolumeSource{Medium: medium}); err != nil {
		return c.due, err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return c.due, err
	}
	defer func() { _ = root.Close() }()
	if medium == corev1.StorageMediumMemory {
		if err := inMemory(root); err != nil {
			return c.due, fmt.Errorf("%s: %w", dir, err)
		}
	}
	for _, name := range nested(pod, vol.Name) {
		if err := root.MkdirAll(name, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return c.due, fmt.Errorf("unable to create nested volume mountpoints: %w", err)
		}
	}
	if err := publish(root, c.files, group); err != nil {
		return c.due, fmt.Errorf("write the content to %s: %w", dir, err)
	}
	return c.due, nil
}

// nested are the mount points of other volumes below this one, relative to it: as
// containers have it read-only, the runtime cannot make them.
func nested(pod *corev1.Pod, volume string) (names []string) {
	for c := range containers(pod) {
		var points []string
		for _, m := range c.VolumeMounts {
			points = append(points, filepath.Clean(m.MountPath))
		}
		slices.Sort(points)
		for _, m := range c.VolumeMounts {
			if m.Name != volume || m.SubPath != "" || m.SubPathExpr != "" {
				continue
			}
			base := strings.TrimSuffix(filepath.Clean(m.MountPath), "/") + "/"
			var outer []string // those below them are made in them, not here
			for _, p := range points {
				if strings.HasPrefix(p, base) && !slices.ContainsFunc(outer, func(o string) bool { return strings.HasPrefix(p, o) }) {
					outer = append(outer, p+"/")
					names = append(names, p[len(base):])
				}
			}
		}
	}
	return names
}

// collector gathers the content of one volume.
type collector struct {
	v     *Volumes
	pod   *corev1.Pod
	dir   string
	mode  int32
	owner *int64
	files payload
	due   time.Time
}

func (c *collector) defaults(mode *int32, owner *int64) {
	c.mode, c.owner = 0o644, owner
	if mode != nil {
		c.mode = *mode
	}
}

// put adds a file with the item's mode and owner, or else the volume's.
func (c *collector) put(name string, data []byte, mode *int32, owner *int64) error {
	if mode == nil {
		mode = &c.mode
	}
	if owner == nil {
		owner = c.owner
	}
	return c.files.add(name, file{data, fs.FileMode(*mode) & fs.ModePerm, owner})
}

// items adds the keys that the pod names, or all. text is the error's about a key
// that there is not.
func (c *collector) items(keys map[string][]byte, items []corev1.KeyToPath, optional *bool, text string) error {
	if len(items) == 0 {
		for key, data := range keys {
			if err := c.put(key, data, nil, nil); err != nil {
				return err
			}
		}
		return nil
	}
	for _, i := range items {
		data, ok := keys[i.Key]
		if !ok {
			if yes(optional) {
				continue
			}
			return fmt.Errorf(text, i.Key)
		}
		if err := c.put(i.Path, data, i.Mode, i.User); err != nil {
			return err
		}
	}
	return nil
}

func yes(b *bool) bool { return b != nil && *b }

func (c *collector) configMap(name string, items []corev1.KeyToPath, optional *bool) error {
	cm, err := c.v.cfg.Objects.ConfigMap(c.pod.Namespace, name)
	if errors.Is(err, source.ErrNotFound) && yes(optional) {
		cm, err = &corev1.ConfigMap{}, nil
	}
	if err != nil {
		return err
	}
	keys := make(map[string][]byte, len(cm.Data)+len(cm.BinaryData))
	for k, d := range cm.BinaryData {
		keys[k] = d
	}
	for k, d := range cm.Data {
		keys[k] = []byte(d)
	}
	return c.items(keys, items, optional, "configmap references non-existent config key: %s")
}

func (c *collector) secret(name string, items []corev1.KeyToPath, optional *bool) error {
	s, err := c.v.cfg.Objects.Secret(c.pod.Namespace, name)
	if errors.Is(err, source.ErrNotFound) && yes(optional) {
		s, err = &corev1.Secret{}, nil
	}
	if err != nil {
		return err
	}
	return c.items(s.Data, items, optional, "references non-existent secret key: %s")
}

// projected gathers all sources, and says all that is wrong with them.
func (c *collector) projected(p *corev1.ProjectedVolumeSource) error {
	c.defaults(p.DefaultMode, p.DefaultUser)
	var errs []error
	for _, s := range p.Sources {
		var err error
		switch {
		case s.Secret != nil:
			err = c.secret(s.Secret.Name, s.Secret.Items, s.Secret.Optional)
		case s.ConfigMap != nil:
			err = c.configMap(s.ConfigMap.Name, s.ConfigMap.Items, s.ConfigMap.Optional)
		case s.DownwardAPI != nil:
			err = c.downwardAPI(s.DownwardAPI.Items)
		case s.ServiceAccountToken != nil:
			err = c.token(s.ServiceAccountToken)
		case s.ClusterTrustBundle != nil:
			if t := s.ClusterTrustBundle; yes(t.Optional) {
				err = c.guarded(t.Path, nil, t.User) // as one that selects nothing
			} else {
				err = fmt.Errorf("an edge node has no cluster trust bundles (file %s)", t.Path)
			}
		case s.PodCertificate != nil:
			err = errors.New("an edge node has no pod certificates")
		default:
			err = errors.New("an edge node serves no such source; it serves secret, configMap, downwardAPI and serviceAccountToken")
		}
		if err != nil {
			errs = append(errs, err)
		}
	}
	return utilerrors.NewAggregate(errs)
}

// downwardAPI adds what the pod asks to know of itself.
func (c *collector) downwardAPI(items []corev1.DownwardAPIVolumeFile) error {
	var errs []error
	for _, i := range items {
		var text string
		var err error
		switch {
		case i.FieldRef != nil:
			text, err = spec.FieldValue(c.pod, i.FieldRef.FieldPath)
		case i.ResourceFieldRef != nil:
			text, err = spec.ResourceValue(i.ResourceFieldRef, c.pod, nil, c.v.allocatable())
		}
		if err == nil {
			err = c.put(i.Path, []byte(text), i.Mode, i.User)
		}
		if err != nil {
			errs = append(errs, err)
		}
	}
	return utilerrors.NewAggregate(errs)
}

// token adds a service account token: the newest that has come from the cloud, or
// else what the volume has already, as nothing better can be had offline.
func (c *collector) token(t *corev1.ServiceAccountTokenProjection) error {
	seconds := int64(tokenSeconds)
	if t.ExpirationSeconds != nil {
		seconds = *t.ExpirationSeconds
	}
	now := time.Now()
	data, expires, err := c.v.cfg.Objects.Token(c.pod.Namespace, c.pod.Name, c.pod.UID, t.Audience, seconds)
	due := expires.Add(-time.Duration(seconds) * time.Second / 5)
	if err != nil {
		due = now
		if data = c.old(t.Path); data == "" {
			return err
		}
		c.v.cfg.Log.Warn("no new service account token: the old one is kept", "pod", c.pod.Name, "namespace", c.pod.Namespace, "path", t.Path, "err", err)
	}
	if due.Before(now.Add(time.Second)) {
		due = now.Add(tokenRetry)
	}
	if c.due.IsZero() || due.Before(c.due) {
		c.due = due
	}
	return c.guarded(t.Path, []byte(data), t.User)
}

// old is what the volume has under the name now.
func (c *collector) old(name string) string {
	root, err := os.OpenRoot(c.dir)
	if err != nil {
		return ""
	}
	defer func() { _ = root.Close() }()
	data, err := root.ReadFile(dataLink + "/" + name)
	if err != nil {
		return ""
	}
	return string(data)
}

// guarded adds a file that only the pod's one user, or its group, may read.
func (c *collector) guarded(name string, data []byte, owner *int64) error {
	if owner == nil {
		owner = c.owner
	}
	if owner == nil {
		owner = onlyUser(c.pod)
	}
	mode := c.mode
	if owner != nil || fsGroup(c.pod) != nil {
		mode = 0o600 // the group's right is added with its ownership
	}
	return c.put(name, data, &mode, owner)
}

// onlyUser is the user that all containers run as, nil where they differ or do not say.
func onlyUser(pod *corev1.Pod) (user *int64) {
	for c := range containers(pod) {
		var u *int64
		if s := pod.Spec.SecurityContext; s != nil {
			u = s.RunAsUser
		}
		if s := c.SecurityContext; s != nil && s.RunAsUser != nil {
			u = s.RunAsUser
		}
		if u == nil || user != nil && *user != *u {
			return nil
		}
		user = u
	}
	return user
}
