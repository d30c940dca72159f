package pods

import (
	"encoding/json"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/fairlead-io/fairlead/edge/pods/source"
	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/seal"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

// objects is what pods refer to, read from the bus each time: the bus has it
// anyway, and a second copy of every Secret would be one more place to lose it.
type objects struct {
	node string
	bus  Bus
	key  *seal.Key
}

var _ source.Objects = (*objects)(nil)

// ConfigMap implements [source.Objects].
func (o *objects) ConfigMap(namespace, name string) (*corev1.ConfigMap, error) {
	b, ok := o.bus.Retained(topic.DesiredConfigMap(o.node, namespace, name))
	if !ok {
		return nil, fmt.Errorf("configmap %q %w", name, source.ErrNotFound)
	}
	var p struct {
		UID        string            `json:"uid"`
		Rev        int64             `json:"rev"`
		Data       map[string]string `json:"data"`
		BinaryData map[string][]byte `json:"binaryData"`
	}
	if err := json.Unmarshal(b, &p); err != nil {
		return nil, fmt.Errorf("configmap %q cannot be read: %w", name, err)
	}
	return &corev1.ConfigMap{
		ObjectMeta: meta(namespace, name, p.UID, p.Rev), Data: p.Data, BinaryData: p.BinaryData,
	}, nil
}

func meta(namespace, name, uid string, rev int64) metav1.ObjectMeta {
	return metav1.ObjectMeta{Namespace: namespace, Name: name, UID: types.UID(uid), ResourceVersion: fmt.Sprint(rev)}
}

// Secret implements [source.Objects].
func (o *objects) Secret(namespace, name string) (*corev1.Secret, error) {
	t := topic.DesiredSecret(o.node, namespace, name)
	b, ok := o.bus.Retained(t)
	if !ok {
		return nil, fmt.Errorf("secret %q %w", name, source.ErrNotFound)
	}
	var d payload.SecretData
	s, err := o.open(t, b, &d)
	if err != nil {
		return nil, fmt.Errorf("secret %q: %w", name, err)
	}
	return &corev1.Secret{ObjectMeta: meta(namespace, name, s.UID, s.Rev), Type: corev1.SecretType(d.Type), Data: d.Data}, nil
}

// Token implements [source.Objects].
func (o *objects) Token(namespace, pod string, uid types.UID, audience string, seconds int64) (string, time.Time, error) {
	t := topic.DesiredToken(o.node, namespace, pod)
	missing := fmt.Errorf("service account token for pod %q %w", pod, source.ErrNotFound)
	b, ok := o.bus.Retained(t)
	if !ok {
		return "", time.Time{}, missing
	}
	var d payload.PodTokens
	s, err := o.open(t, b, &d)
	switch {
	case err != nil:
		return "", time.Time{}, fmt.Errorf("service account token for pod %q: %w", pod, err)
	case s.UID != string(uid):
		return "", time.Time{}, missing
	}
	for _, k := range d.Tokens {
		if k.Audience == audience && k.Seconds == seconds {
			return k.Token, time.UnixMilli(k.Exp), nil
		}
	}
	return "", time.Time{}, missing
}

// open reads a sealed payload.
func (o *objects) open(t topic.Topic, b []byte, into any) (payload.Sealed, error) {
	var s payload.Sealed
	if err := payload.Decode(b, &s); err != nil {
		return s, fmt.Errorf("cannot be read: %w", err)
	}
	plain, err := o.key.OpenPayload(t, s)
	if err != nil {
		return s, err
	}
	if err := json.Unmarshal(plain, into); err != nil {
		return s, fmt.Errorf("cannot be read: %w", err)
	}
	return s, nil
}
