// Command manifests renders kustomizations with kustomize itself and judges each
// object by the schema of its kind, strictly: a field that the schema does not know is
// a complaint, as are a wrong type and a missing field.
//
//	manifests -swagger swagger.json [-crds FILE]... DIRECTORY...
//
// It prints one JSON value: for each directory the objects and the complaints. It
// knows nothing of edgeward; test/manifests builds it, gives it the schemas, and has
// laws of its own for what comes out. A DIRECTORY that is a file is read as it is.
package main

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"strings"

	"github.com/santhosh-tekuri/jsonschema/v6"
	"sigs.k8s.io/kustomize/api/krusty"
	"sigs.k8s.io/kustomize/kyaml/filesys"
	"sigs.k8s.io/yaml"
)

// rendering is what came of one directory.
type rendering struct {
	Objects    []map[string]any `json:"objects"`
	Complaints []string         `json:"complaints"`
}

func main() {
	swagger := flag.String("swagger", "", "the OpenAPI document of Kubernetes")
	var crds []string
	flag.Func("crds", "file of CustomResourceDefinitions; may be given several times", func(name string) error {
		crds = append(crds, name)
		return nil
	})
	flag.Parse()
	if err := run(*swagger, crds, flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, "manifests:", err)
		os.Exit(1)
	}
}

func run(swagger string, crds, dirs []string) error {
	j, err := newJudge(swagger, crds)
	if err != nil {
		return err
	}
	all := map[string]rendering{}
	for _, dir := range dirs {
		objects, err := objectsOf(dir)
		if err != nil {
			return fmt.Errorf("render %s: %w", dir, err)
		}
		r := rendering{Objects: objects}
		for _, object := range objects {
			r.Complaints = append(r.Complaints, j.complaints(object)...)
		}
		all[dir] = r
	}
	return json.NewEncoder(os.Stdout).Encode(all)
}

// objectsOf renders a kustomization, or reads a file of documents.
func objectsOf(path string) ([]map[string]any, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !info.IsDir() {
		return documents(path)
	}
	resources, err := krusty.MakeKustomizer(krusty.MakeDefaultOptions()).Run(filesys.MakeFsOnDisk(), path)
	if err != nil {
		return nil, err
	}
	var objects []map[string]any
	for _, resource := range resources.Resources() {
		object, err := resource.Map()
		if err != nil {
			return nil, err
		}
		objects = append(objects, object)
	}
	return objects, nil
}

// documents reads a file of YAML documents, in which a key that is there twice is an
// error.
func documents(path string) ([]map[string]any, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var objects []map[string]any
	for _, document := range strings.Split("\n"+string(text), "\n---") {
		var object map[string]any
		if err := yaml.UnmarshalStrict([]byte(document), &object); err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		if object != nil {
			objects = append(objects, object)
		}
	}
	return objects, nil
}

// judge holds a schema for each kind, by apiVersion and kind.
type judge struct {
	compiler *jsonschema.Compiler
	places   map[string]string // where the compiler finds a kind's schema
}

func newJudge(swagger string, crds []string) (*judge, error) {
	j := &judge{compiler: jsonschema.NewCompiler(), places: map[string]string{}}
	text, err := os.ReadFile(swagger)
	if err != nil {
		return nil, err
	}
	var document struct {
		Definitions map[string]map[string]any `json:"definitions"`
	}
	if err := json.Unmarshal(text, &document); err != nil {
		return nil, fmt.Errorf("read %s: %w", swagger, err)
	}
	definitions := map[string]any{}
	for name, schema := range document.Definitions {
		definitions[name] = strict(schema)
		kinds, _ := schema["x-kubernetes-group-version-kind"].([]any)
		for _, kind := range kinds {
			kind := kind.(map[string]any)
			version := strings.TrimPrefix(fmt.Sprintf("%s/%s", kind["group"], kind["version"]), "/")
			j.places[fmt.Sprintf("%s %s", version, kind["kind"])] = "kubernetes.json#/definitions/" + name
		}
	}
	// A quantity is declared a string, and the API server takes numbers too.
	definitions["io.k8s.apimachinery.pkg.api.resource.Quantity"] = map[string]any{"type": []any{"string", "number"}}
	if err := j.compiler.AddResource("kubernetes.json", map[string]any{"definitions": definitions}); err != nil {
		return nil, err
	}
	for _, name := range crds {
		if err := j.addCRDs(name); err != nil {
			return nil, fmt.Errorf("read %s: %w", name, err)
		}
	}
	return j, nil
}

func (j *judge) addCRDs(name string) error {
	objects, err := documents(name)
	if err != nil {
		return err
	}
	for _, object := range objects {
		text, err := json.Marshal(object)
		if err != nil {
			return err
		}
		var crd struct {
			Kind string
			Spec struct {
				Group    string
				Names    struct{ Kind string }
				Versions []struct {
					Name   string
					Schema struct{ OpenAPIV3Schema map[string]any }
				}
			}
		}
		if err := json.Unmarshal(text, &crd); err != nil {
			return err
		}
		if crd.Kind != "CustomResourceDefinition" {
			continue
		}
		for _, version := range crd.Spec.Versions {
			if version.Schema.OpenAPIV3Schema == nil {
				return fmt.Errorf("%s has no schema", crd.Spec.Names.Kind)
			}
			schema := strict(version.Schema.OpenAPIV3Schema)
			properties := schema["properties"].(map[string]any)
			properties["apiVersion"], properties["kind"] = map[string]any{"type": "string"}, map[string]any{"type": "string"}
			properties["metadata"] = map[string]any{"$ref": "kubernetes.json#/definitions/io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"}
			place := fmt.Sprintf("%s-%s-%s.json", crd.Spec.Group, version.Name, crd.Spec.Names.Kind)
			if err := j.compiler.AddResource(place, schema); err != nil {
				return err
			}
			j.places[fmt.Sprintf("%s/%s %s", crd.Spec.Group, version.Name, crd.Spec.Names.Kind)] = place
		}
	}
	return nil
}

// complaints says what is wrong with an object, a line each.
func (j *judge) complaints(object map[string]any) []string {
	kind := fmt.Sprintf("%v %v", object["apiVersion"], object["kind"])
	metadata, _ := object["metadata"].(map[string]any)
	called := fmt.Sprintf("%v %v/%v", kind, metadata["namespace"], metadata["name"])
	place, ok := j.places[kind]
	if !ok {
		return []string{called + ": there is no schema of this kind"}
	}
	schema, err := j.compiler.Compile(place)
	if err != nil {
		return []string{fmt.Sprintf("%s: %v", called, err)}
	}
	// The validator wants what encoding/json makes of numbers.
	text, err := json.Marshal(object)
	if err != nil {
		return []string{fmt.Sprintf("%s: %v", called, err)}
	}
	value, err := jsonschema.UnmarshalJSON(strings.NewReader(string(text)))
	if err != nil {
		return []string{fmt.Sprintf("%s: %v", called, err)}
	}
	err = schema.Validate(value)
	var invalid *jsonschema.ValidationError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &invalid):
		return leaves(called, invalid)
	default:
		return []string{fmt.Sprintf("%s: %v", called, err)}
	}
}

// leaves lists the innermost causes of an error, which are what a reader can mend.
func leaves(called string, err *jsonschema.ValidationError) []string {
	if len(err.Causes) == 0 {
		text, _, _ := strings.Cut(err.Error(), "\n- ")
		_, cause, found := strings.Cut(err.Error(), "\n- ")
		if found {
			text = cause
		}
		return []string{called + ": " + text}
	}
	var all []string
	for _, cause := range err.Causes {
		all = append(all, leaves(called, cause)...)
	}
	return all
}

// strict copies a schema of Kubernetes as one of JSON Schema that knows all fields: an
// object with properties has no others.
func strict(schema map[string]any) map[string]any {
	made := map[string]any{}
	for key, value := range schema {
		switch value := value.(type) {
		case map[string]any:
			if key == "properties" || key == "patternProperties" {
				properties := map[string]any{}
				for name, property := range value {
					properties[name] = strict(property.(map[string]any))
				}
				made[key] = properties
			} else {
				made[key] = strict(value)
			}
		case []any:
			items := make([]any, len(value))
			for i, item := range value {
				if of, ok := item.(map[string]any); ok {
					item = strict(of)
				}
				items[i] = item
			}
			made[key] = items
		case string:
			if key == "$ref" {
				value = "kubernetes.json" + value
			}
			made[key] = value
		default:
			made[key] = value
		}
	}
	delete(made, "format")
	if schema["format"] == "int-or-string" || schema["x-kubernetes-int-or-string"] == true {
		delete(made, "type")
		delete(made, "pattern") // of the string alone
		made["type"] = []any{"integer", "string"}
	}
	_, has := made["properties"]
	_, open := made["additionalProperties"]
	if has && !open && schema["x-kubernetes-preserve-unknown-fields"] != true {
		made["additionalProperties"] = false
	}
	return made
}
