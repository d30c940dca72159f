package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/fairlead-io/fairlead/schemas/device"
)

// The resources of schemas/crd.
var (
	devices = schema.GroupVersionResource{Group: "fairlead.dev", Version: "v1alpha1", Resource: "devices"}
	models  = schema.GroupVersionResource{Group: "fairlead.dev", Version: "v1alpha1", Resource: "devicemodels"}
)

// edgeLabel marks the Nodes of the fabric.
const edgeLabel = "node-role.kubernetes.io/edge"

// deviceObject is a Device.
type deviceObject struct {
	metav1.ObjectMeta `json:"metadata"`

	Spec   device.Spec   `json:"spec"`
	Status device.Status `json:"status"`
}

// rest reads the kubeconfig that was named. A kubeconfig of the environment is
// not looked at: a command must not write to a cluster that nobody named.
func (a *app) rest() (*rest.Config, error) {
	if a.kubeconfig == "" {
		return nil, errors.New("no cluster named: give --kubeconfig FILE (KUBECONFIG is not read, so that no cluster is changed by accident)")
	}
	file, err := clientcmd.LoadFromFile(a.kubeconfig)
	if err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("--kubeconfig %s: no such file", a.kubeconfig)
		}
		return nil, fmt.Errorf("--kubeconfig %s is not a kubeconfig: %w", a.kubeconfig, err)
	}
	cfg, err := clientcmd.NewNonInteractiveClientConfig(*file, "", nil, nil).ClientConfig()
	if err != nil {
		return nil, fmt.Errorf("--kubeconfig %s: %w", a.kubeconfig, err)
	}
	cfg.Timeout = a.timeout
	cfg.UserAgent = "fairlead/" + buildVersion()
	return cfg, nil
}

func (a *app) kube() (kubernetes.Interface, *rest.Config, error) {
	cfg, err := a.rest()
	if err != nil {
		return nil, nil, err
	}
	k, err := kubernetes.NewForConfig(cfg)
	return k, cfg, err
}

func (a *app) dynamic() (dynamic.Interface, *rest.Config, error) {
	cfg, err := a.rest()
	if err != nil {
		return nil, nil, err
	}
	d, err := dynamic.NewForConfig(cfg)
	return d, cfg, err
}

// kubeError says what a person can do about an API error.
func (a *app) kubeError(cfg *rest.Config, err error) error {
	var netErr net.Error
	switch {
	case err == nil:
		return nil
	case apierrors.IsUnauthorized(err):
		return fmt.Errorf("the Kubernetes API at %s does not know the user of %s: %w", cfg.Host, a.kubeconfig, err)
	case apierrors.ReasonForError(err) != metav1.StatusReasonUnknown:
		return err // the API's own words
	case errors.As(err, &netErr):
		if netErr.Timeout() {
			return fmt.Errorf("no answer from the Kubernetes API at %s within %s; is the cluster of %s running?", cfg.Host, a.timeout, a.kubeconfig)
		}
		return fmt.Errorf("no answer from the Kubernetes API at %s: %w; is the cluster of %s running?", cfg.Host, root(err), a.kubeconfig)
	}
	return err
}

// read converts by way of JSON: values stay as they were written.
func read(u *unstructured.Unstructured) (*deviceObject, error) {
	b, err := json.Marshal(u.Object)
	if err != nil {
		return nil, err
	}
	var d deviceObject
	if err := json.Unmarshal(b, &d); err != nil {
		return nil, fmt.Errorf("device %s/%s: %w", u.GetNamespace(), u.GetName(), err)
	}
	return &d, nil
}

// deviceOf is the Device of a watch event, nil for anything else.
func deviceOf(o runtime.Object) *deviceObject {
	u, ok := o.(*unstructured.Unstructured)
	if !ok {
		return nil
	}
	d, err := read(u)
	if err != nil {
		return nil
	}
	return d
}

// fate tells what became of the cloud's wish for a property, once the status is
// about the generation that holds it.
func fate(d *deviceObject, name string, generation int64) (o outcome, done bool) {
	if d.Status.ObservedGeneration < generation {
		return o, false
	}
	for _, p := range d.Status.Properties {
		if p.Name != name || p.Desired == nil || !p.Desired.Acked {
			continue
		}
		applied := p.Desired.Error == ""
		return outcome{OK: true, Rev: p.Desired.Rev, Applied: &applied, Reason: p.Desired.Error, Value: p.Value}, true
	}
	return o, false
}

// model finds the property in the device's model; nil where there is none, then
// the cluster answers for the value.
func (a *app) model(ctx context.Context, w wish) (*device.Property, error) {
	dyn, cfg, err := a.dynamic()
	if err != nil {
		return nil, err
	}
	u, err := dyn.Resource(devices).Namespace(w.ns).Get(ctx, w.device, metav1.GetOptions{})
	if err != nil {
		return nil, a.kubeError(cfg, err)
	}
	d, err := read(u)
	if err != nil {
		return nil, err
	}
	m, err := dyn.Resource(models).Namespace(w.ns).Get(ctx, d.Spec.Model, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, a.kubeError(cfg, err)
	}
	b, err := json.Marshal(m.Object["spec"])
	if err != nil {
		return nil, err
	}
	var spec device.ModelSpec
	if err := json.Unmarshal(b, &spec); err != nil {
		return nil, nil //nolint:nilerr // a model of a newer version: the cluster answers for the value
	}
	p, _ := (&device.Device{Properties: spec.Properties}).Property(w.property)
	return p, nil
}
