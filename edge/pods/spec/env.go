package spec

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/fairlead-io/fairlead/edge/pods/source"
)

// EnvInput is what a container's environment is made of.
type EnvInput struct {
	Node      *Node
	Pod       *corev1.Pod
	Container *corev1.Container
	Objects   source.Objects
	// PodIPs are the sandbox's addresses, or the host's where the pod has its network.
	PodIPs []string
	// Services are the Kubernetes API's ("kubernetes"), and those of the pod's
	// namespace, which it gets nothing of with enableServiceLinks: false.
	Services []Service
	// File reads the file at path in the pod's volume of that name, for fileKeyRef.
	// Nil where no volume can be read.
	File func(volume, path string) ([]byte, error)
}

// Env makes the environment of a container: envFrom, then env with references
// expanded, in the order they are declared, then the variables of the services.
// Its errors are *ConfigError; errors.Is(err, source.ErrNotFound) where an object
// has not arrived.
func Env(in EnvInput) ([]*runtimeapi.KeyValue, error) {
	e := env{EnvInput: in, at: map[string]int{}}
	services := serviceEnv(in.Pod, in.Services)
	byName := make(map[string]string, len(services))
	for _, kv := range services {
		byName[kv.Key] = string(kv.Value)
	}
	for i := range in.Container.EnvFrom {
		if err := e.from(&in.Container.EnvFrom[i]); err != nil {
			return nil, configError(err)
		}
	}
	for i := range in.Container.Env {
		v := &in.Container.Env[i]
		value, ok := expand(v.Value, func(name string) string {
			if i, ok := e.at[name]; ok {
				return string(e.vars[i].Value)
			}
			if s, ok := byName[name]; ok {
				return s
			}
			return "$(" + name + ")"
		}), true
		if v.Value == "" && v.ValueFrom != nil {
			var err error
			if value, ok, err = e.value(v.ValueFrom); err != nil {
				return nil, configError(err)
			}
		}
		if ok {
			e.set(v.Name, value)
		}
	}
	for _, kv := range services {
		if _, ok := e.at[kv.Key]; !ok {
			e.vars = append(e.vars, kv)
		}
	}
	return e.vars, nil
}

type env struct {
	EnvInput
	vars []*runtimeapi.KeyValue
	at   map[string]int // index in vars
}

func (e *env) set(name, value string) {
	kv := &runtimeapi.KeyValue{Key: name, Value: []byte(value)}
	if i, ok := e.at[name]; ok {
		e.vars[i] = kv
		return
	}
	e.at[name] = len(e.vars)
	e.vars = append(e.vars, kv)
}

// from takes in a whole ConfigMap or Secret.
func (e *env) from(f *corev1.EnvFromSource) error {
	switch {
	case f.ConfigMapRef != nil:
		cm, err := e.Objects.ConfigMap(e.Pod.Namespace, f.ConfigMapRef.Name)
		if err != nil {
			return unlessOptional(err, f.ConfigMapRef.Optional)
		}
		for _, k := range slices.Sorted(maps.Keys(cm.Data)) {
			e.set(f.Prefix+k, cm.Data[k])
		}
	case f.SecretRef != nil:
		secret, err := e.Objects.Secret(e.Pod.Namespace, f.SecretRef.Name)
		if err != nil {
			return unlessOptional(err, f.SecretRef.Optional)
		}
		for _, k := range slices.Sorted(maps.Keys(secret.Data)) {
			e.set(f.Prefix+k, string(secret.Data[k]))
		}
	}
	return nil
}

// value gives what a variable refers to; false where it is left out, being optional.
func (e *env) value(from *corev1.EnvVarSource) (string, bool, error) {
	switch {
	case from.FieldRef != nil:
		v, err := envField(from.FieldRef, e.Pod, e.Node, e.PodIPs)
		return v, true, err
	case from.ResourceFieldRef != nil:
		v, err := ResourceValue(from.ResourceFieldRef, e.Pod, e.Container, e.Node.Allocatable)
		return v, true, err
	case from.ConfigMapKeyRef != nil:
		ref := from.ConfigMapKeyRef
		cm, err := e.Objects.ConfigMap(e.Pod.Namespace, ref.Name)
		if err != nil {
			return "", false, unlessOptional(err, ref.Optional)
		}
		v, ok := cm.Data[ref.Key]
		if !ok && !isTrue(ref.Optional) {
			return "", false, fmt.Errorf("couldn't find key %v in ConfigMap %v/%v", ref.Key, e.Pod.Namespace, ref.Name)
		}
		return v, ok, nil
	case from.SecretKeyRef != nil:
		ref := from.SecretKeyRef
		secret, err := e.Objects.Secret(e.Pod.Namespace, ref.Name)
		if err != nil {
			return "", false, unlessOptional(err, ref.Optional)
		}
		v, ok := secret.Data[ref.Key]
		if !ok && !isTrue(ref.Optional) {
			return "", false, fmt.Errorf("couldn't find key %v in Secret %v/%v", ref.Key, e.Pod.Namespace, ref.Name)
		}
		return string(v), ok, nil
	case from.FileKeyRef != nil:
		return e.file(from.FileKeyRef)
	}
	return "", true, nil
}

func (e *env) file(ref *corev1.FileKeySelector) (string, bool, error) {
	if e.File == nil {
		return "", false, fmt.Errorf("cannot find the volume %q referenced by FileKeyRef", ref.VolumeName)
	}
	content, err := e.File(ref.VolumeName, ref.Path)
	if err != nil {
		return "", false, fmt.Errorf("couldn't parse env file: %w", err)
	}
	v, err := parseEnvFile(string(content), ref.Key)
	if err != nil {
		return "", false, fmt.Errorf("couldn't parse env file: %w", err)
	}
	if v == "" && !isTrue(ref.Optional) {
		return "", false, fmt.Errorf("environment variable key %q not found in file %q", ref.Key, ref.Path)
	}
	return v, v != "", nil
}

// parseEnvFile gives the value of key in a file of lines NAME='value'. A value may
// span lines and has no escapes; a # begins a comment. Lines behind the key's are
// not looked at. "" where the key is not there.
func parseEnvFile(content, key string) (string, error) {
	bad := func(line int, what string) error {
		return fmt.Errorf("invalid environment variable format at line %d: %s", line, what)
	}
	for line := 1; content != ""; line++ {
		var text string
		text, content = cutLine(content)
		text = strings.TrimLeft(text, " \t")
		if text == "" || text[0] == '#' {
			continue
		}
		name, value, ok := strings.Cut(text, "=")
		switch {
		case !ok:
			return "", bad(line, "missing '='")
		case strings.TrimRight(name, " \t") == "":
			return "", bad(line, "empty variable name")
		case strings.TrimRight(name, " \t") != name:
			return "", bad(line, "whitespace before '=' is not allowed")
		case value != "" && (value[0] == ' ' || value[0] == '\t'):
			// As in a shell: an assignment of nothing.
			if name == key {
				return "", nil
			}
			continue
		case !strings.HasPrefix(value, "'"):
			return "", bad(line, "value must be enclosed in single quotes")
		}
		begin := line
		quoted, after, closed := strings.Cut(value[1:], "'")
		for !closed {
			if content == "" {
				return "", fmt.Errorf("invalid environment variable format starting at line %d: unclosed single quote", begin)
			}
			text, content = cutLine(content)
			line++
			var more string
			more, after, closed = strings.Cut(text, "'")
			quoted += "\n" + more
		}
		if after = strings.TrimLeft(after, " \t"); after != "" && after[0] != '#' {
			return "", bad(line, "unexpected content after closing quote")
		}
		if name == key {
			return quoted, nil
		}
	}
	return "", nil
}

func cutLine(s string) (line, rest string) {
	line, rest, _ = strings.Cut(s, "\n")
	return strings.TrimSuffix(line, "\r"), rest
}

func unlessOptional(err error, optional *bool) error {
	if isTrue(optional) && errors.Is(err, source.ErrNotFound) {
		return nil
	}
	return err
}

func isTrue(b *bool) bool { return b != nil && *b }

// serviceEnv makes the variables of the services, in the order of their names.
func serviceEnv(pod *corev1.Pod, services []Service) []*runtimeapi.KeyValue {
	links := pod.Spec.EnableServiceLinks == nil || *pod.Spec.EnableServiceLinks
	seen := map[string]*Service{}
	for i := range services {
		s := &services[i]
		if s.ClusterIP == "" || s.ClusterIP == corev1.ClusterIPNone || len(s.Ports) == 0 || !links && s.Name != "kubernetes" {
			continue
		}
		if seen[s.Name] == nil {
			seen[s.Name] = s
		}
	}
	var out []*runtimeapi.KeyValue
	for _, name := range slices.Sorted(maps.Keys(seen)) {
		out = seen[name].env(out)
	}
	return out
}

// env appends the variables of a service: its address and ports, and what Docker
// links had.
func (s *Service) env(out []*runtimeapi.KeyValue) []*runtimeapi.KeyValue {
	set := func(name, value string) {
		out = append(out, &runtimeapi.KeyValue{Key: name, Value: []byte(value)})
	}
	name := envName(s.Name)
	set(name+"_SERVICE_HOST", s.ClusterIP)
	set(name+"_SERVICE_PORT", strconv.Itoa(int(s.Ports[0].Port)))
	for _, p := range s.Ports {
		if p.Name != "" {
			set(name+"_SERVICE_PORT_"+envName(p.Name), strconv.Itoa(int(p.Port)))
		}
	}
	for i, p := range s.Ports {
		protocol := string(p.Protocol)
		if protocol == "" {
			protocol = string(corev1.ProtocolTCP)
		}
		port := strconv.Itoa(int(p.Port))
		url := strings.ToLower(protocol) + "://" + net.JoinHostPort(s.ClusterIP, port)
		if i == 0 {
			set(name+"_PORT", url)
		}
		prefix := name + "_PORT_" + port + "_" + strings.ToUpper(protocol)
		set(prefix, url)
		set(prefix+"_PROTO", strings.ToLower(protocol))
		set(prefix+"_PORT", port)
		set(prefix+"_ADDR", s.ClusterIP)
	}
	return out
}

func envName(s string) string {
	return strings.ToUpper(strings.ReplaceAll(s, "-", "_"))
}
