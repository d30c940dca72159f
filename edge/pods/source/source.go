// Package source says where the pod engine finds what pods refer to: ConfigMaps,
// Secrets and service account tokens, as the node's bus has them.
//
//	cm, err := objects.ConfigMap("default", "nginx-conf")
//	if errors.Is(err, source.ErrNotFound) { … the pod waits … }
package source

import (
	"errors"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
)

// ErrNotFound is wrapped by the errors about an object that has not arrived. Its
// text, such as `configmap "nginx-conf" not found`, is the stock kubelet's.
var ErrNotFound = errors.New("not found")

// Objects is what pods refer to. Its methods do not block, and may be called
// from several goroutines. Nobody changes what they return.
type Objects interface {
	// ConfigMap gives a ConfigMap of a pod of this node; ErrNotFound where it
	// has not arrived or does not exist.
	ConfigMap(namespace, name string) (*corev1.ConfigMap, error)
	// Secret gives a Secret, opened; ErrNotFound as above.
	Secret(namespace, name string) (*corev1.Secret, error)
	// Token gives the newest token that the cloud has issued for the pod, and when
	// it expires; ErrNotFound where none has arrived. One that has expired is given
	// all the same: offline there is nothing better. An empty audience is the API
	// server's.
	Token(namespace, pod string, uid types.UID, audience string, expirationSeconds int64) (token string, expires time.Time, err error)
}
